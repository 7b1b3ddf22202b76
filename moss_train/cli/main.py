"""The command line: run one command; expected errors become one line and an exit status."""

import argparse
import importlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from moss_train import __version__
from moss_train.cli import help as help_texts
from moss_train.config.section import nearest
from moss_train.utils.errors import PreemptedError, UserError
from moss_train.utils.files import printable

PROGRAM = "moss_train"
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see python -m {PROGRAM} --help)")


def run_program() -> NoReturn:
    """Run one command and exit with its status.

    In distributed training a process that failed exits at once. Python would first run the exit handlers of torch and
    Lightning, and that of NCCL waits for the other ranks, which wait for this one in a collective operation.
    """
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = EXIT_FAILED
    distributed = sys.modules.get("torch.distributed")
    is_connected = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if is_connected and status in (EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status.

    The status is 0 for success, 1 for failures that the command reports, a training that diverged or a full GPU, 2 for
    wrong input, 130 after Ctrl-C, and 143 if SIGTERM stopped a run after a checkpoint.

    Any other exception is a bug in moss_train and passes through with its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    # oneDNN's AMX convolutions of bfloat16 read uninitialised memory when the channels do not fill a tile.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    # Idle OpenMP threads spin long by default: with any other process running, updates of 0.4 s took half a minute.
    # No spinning at all (OMP_WAIT_POLICY=PASSIVE) doubles the time of small models; this short spinning costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Batches have many lengths: memory segments of fixed size would fragment the memory of a GPU.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # transformers shows two progress bars for every model that it loads or saves.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def one_line_warning(message: Warning | str, *_: object, **__: object) -> str:
        # The line of our code that raised the warning does not help users.
        return f"warning: {printable(' '.join(str(message).split()))}\n"

    warnings.formatwarning = one_line_warning
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end a command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    commands = help_texts.find_commands()
    command = next((argument for argument in argv if argument in commands), "")
    try:
        return _run(argv, commands)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (UserError, OSError, FloatingPointError, PreemptedError, KeyboardInterrupt) as error:
        message, status = " ".join(str(error).split()) or type(error).__name__, EXIT_USER_ERROR
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        elif isinstance(error, FloatingPointError):
            status = EXIT_FAILED
        elif isinstance(error, PreemptedError):
            status = 128 + error.number
        elif isinstance(error, KeyboardInterrupt):
            message, status = "interrupted", EXIT_INTERRUPTED
        if "--traceback" in argv:
            traceback.print_exc()
        print(printable(f"{PROGRAM} {command}: {message}" if command else f"{PROGRAM}: {message}"), file=sys.stderr)
        return status
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError) or "--traceback" in argv:
            raise
        message = ". ".join(" ".join(str(error).split()).split(". ")[:2])  # what was tried, without figures and advice
        print(
            printable(f"{PROGRAM} {command}: {message}: use smaller batches, shorter clips or a GPU with more memory"),
            file=sys.stderr,
        )
        return EXIT_FAILED


def _run(argv: list[str], commands: dict[str, str]) -> int:
    """Split the command line into command, flags and overrides, and run it."""
    parser = _Parser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("--traceback", action="store_true")
    parser.add_argument("--version", action="store_true")
    arguments = parser.parse_intermixed_args(argv)
    folder = None if arguments.config_dir is None else arguments.config_dir.expanduser().absolute()
    if folder is not None and not folder.is_dir():
        raise UserError(f"--config-dir {folder} is not a folder")
    if arguments.version:
        print(f"{PROGRAM} {__version__}")
        return 0
    if not arguments.words:
        print(help_texts.program_help(commands), file=sys.stdout if arguments.help else sys.stderr)
        return 0 if arguments.help else EXIT_USER_ERROR
    command, *overrides = arguments.words
    if command not in commands:
        raise UserError(f"unknown command {command!r}: {nearest(command, commands, 'there are')}")
    if arguments.help:
        print(help_texts.command_help(command, folder))
        return 0

    from moss_train.cli.compose import compose, open_plugins, parse_config, to_yaml
    from moss_train.config.schema import check_inputs

    values = compose(command, overrides, folder)
    if arguments.cfg is not None:
        print(to_yaml(values), end="")
        return 0
    config = parse_config(command, values)
    check_inputs(config)
    open_plugins(config)
    run: Callable[[Any], int | None] = importlib.import_module(f"moss_train.commands.{command}").run
    return run(config) or 0
