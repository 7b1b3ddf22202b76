"""The command line: run one command; expected errors become one line and an exit status."""

import argparse
import importlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Arguments:
    """What stands on the command line, before any configuration is read."""

    command: str | None
    overrides: tuple[str, ...]
    show_help: bool
    show_config: bool
    show_version: bool
    config_directory: Path | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see python -m {PROGRAM} --help)")


def run_program() -> NoReturn:
    """Run one command and end with its status.

    When several processes train together, one that failed ends at once. Python would first run the farewells that torch
    and Lightning have registered, and NCCL's waits for the others, who wait for this one in a collective.
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

    0 done, 1 the command's own report of failure or numbers that diverged, 2 wrong input, 130 Ctrl-C, 143 stopped by
    SIGTERM after a checkpoint.

    Any other exception is a bug of ours and passes through with its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    # oneDNN's AMX convolutions of bfloat16 read memory that nobody wrote when channels do not fill a tile.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    # Idle OpenMP threads spin long by default: beside any other process that made updates of 0.4 s take half a minute.
    # Not at all (OMP_WAIT_POLICY=PASSIVE) costs twice the time on small models, this little costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Batches have many lengths: blocks of fixed size would leave gaps in the memory of a GPU.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault(
        "HF_HUB_DISABLE_PROGRESS_BARS", "1"
    )  # transformers shows two for every model, read or written
    warnings.formatwarning = _one_line_warning
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show ends no command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    command = next((argument for argument in argv if argument in help_texts.find_commands()), "")
    try:
        return _run(parse_arguments(argv))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (UserError, OSError) as error:
        return _fail(command, _one_line(error), EXIT_USER_ERROR, argv)
    except FloatingPointError as error:
        return _fail(command, _one_line(error), EXIT_FAILED, argv)
    except PreemptedError as error:
        return _fail(command, str(error), 128 + error.number, argv)
    except KeyboardInterrupt:
        return _fail(command, "interrupted", EXIT_INTERRUPTED, argv)


def _one_line_warning(message: Warning | str, *_: object, **__: object) -> str:
    """What went on all the same, in one line: the place in our code that said so helps no user."""
    return f"warning: {printable(' '.join(str(message).split()))}\n"


def parse_arguments(argv: list[str]) -> Arguments:
    """Split the command line into command, flags and Hydra overrides. Raises UserError for an unknown flag."""
    parser = _Parser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("--traceback", action="store_true")
    parser.add_argument("--version", action="store_true")
    found = parser.parse_intermixed_args(argv)
    return Arguments(
        command=found.words[0] if found.words else None,
        overrides=tuple(found.words[1:]),
        show_help=found.help,
        show_config=found.cfg is not None,
        show_version=found.version,
        config_directory=_existing_directory(found.config_dir),
    )


def _run(arguments: Arguments) -> int:
    if arguments.show_version:
        print(f"{PROGRAM} {__version__}")
        return 0
    commands = help_texts.find_commands()
    if arguments.command is None:
        text = help_texts.program_help(commands)
        print(text, file=sys.stdout if arguments.show_help else sys.stderr)
        return 0 if arguments.show_help else EXIT_USER_ERROR
    if arguments.command not in commands:
        raise UserError(f"unknown command {arguments.command!r}: {nearest(arguments.command, commands, 'there are')}")
    if arguments.show_help:
        print(help_texts.command_help(arguments.command, arguments.config_directory))
        return 0
    return _run_command(arguments.command, arguments)


def _run_command(command: str, arguments: Arguments) -> int:
    from moss_train.cli.compose import compose, open_plugins, parse_config, to_yaml
    from moss_train.config.schema import check_inputs

    values = compose(command, arguments.overrides, arguments.config_directory)
    if arguments.show_config:
        print(to_yaml(values), end="")
        return 0
    config = parse_config(command, values)
    check_inputs(config)
    open_plugins(config)
    run: Callable[[Any], int | None] = importlib.import_module(f"moss_train.commands.{command}").run
    return run(config) or 0


def _existing_directory(path: Path | None) -> Path | None:
    if path is None:
        return None
    path = path.expanduser().absolute()
    if not path.is_dir():
        raise UserError(f"--config-dir {path} is not a folder")
    return path


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(command: str, message: str, status: int, argv: list[str]) -> int:
    if "--traceback" in argv:
        traceback.print_exc()
    print(printable(f"{PROGRAM} {command}: {message}" if command else f"{PROGRAM}: {message}"), file=sys.stderr)
    return status
