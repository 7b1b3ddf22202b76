"""Run commands as forks of one process that has already imported the program.

A fork starts in milliseconds, a fresh interpreter takes seconds, so tests can start and kill many real processes.
Started by `harness.py`. It reads one JSON line per request and writes one JSON line per answer.
"""

import ctypes
import importlib
import json
import os
import resource
import runpy
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
CAPABILITY_VERSION = 0x20080522


def serve() -> int:
    """Answer requests until standard input ends: `start` forks a command, `poll` asks for its exit status."""
    warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        elif (pid := os.fork()) == 0:
            return run(order["start"])
        else:
            print(pid, flush=True)
    return 0


def warm_up() -> None:
    """Do once what every run would do first: import everything, read the shipped files, draw a figure with fonts."""
    import torch

    import moss_train.commands.fit
    import moss_train.commands.inspect  # noqa: F401
    from moss_train import load_config
    from moss_train.plotting import Curve, Panel, save_curves

    torch.set_num_threads(1)
    for experiment in ("cat_tiny", "cat_1b6"):
        load_config("fit", [f"experiment={experiment}", "data.train=unused"])
    with tempfile.TemporaryDirectory() as folder:
        save_curves([Panel("", [Curve("", [0, 1], [1, 10])], logarithmic=True)], Path(folder) / "curve.png", "")


def run(job: dict[str, Any]) -> int:
    """Turn this process into that of one command: own session, environment, log, limits and fault."""
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1), os.dup2(log, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(job["environment"])
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
    inject(job["fault"])
    if "script" in job:
        sys.argv = [job["script"], *job["arguments"]]
        runpy.run_path(job["script"], run_name="__main__")
        return 0
    from moss_train.cli.main import main

    return main(job["arguments"])


def inject(fault: dict[str, Any]) -> None:
    """Set up the fault of this process.

    Args:
        fault: any of
            calls: [function, n, further]: send a signal `further` Python calls after the n-th call of a function;
            event: [audit event, text, n]: send a signal before the n-th audit event with the text in its arguments;
            signal: which one, SIGKILL by default;
            worker: [n, "kill" or "hang"]: kill or block a data worker instead of reading its n-th update;
            file_bytes: limit the size of files, as on a full disk (Errno 27, File too large);
            file_bytes_kill: as above, but the process is killed by the write that reaches the limit;
            slow_sync: duration of every fsync in seconds;
            no_override: file permissions apply to root too, as to other users;
            constants: new values for module constants by dotted name, such as time limits too long for a test.
    """
    number = fault.get("signal", signal.SIGKILL)
    if "calls" in fault:
        signal_after_calls(number, *fault["calls"])
    if "event" in fault:
        signal_at_event(number, *fault["event"])
    if "worker" in fault:
        os.register_at_fork(after_in_child=lambda: spoil_worker(*fault["worker"]))
    if "file_bytes" in fault or "file_bytes_kill" in fault:
        length = fault.get("file_bytes") or fault["file_bytes_kill"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (length, length))
    if "file_bytes_kill" in fault:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if "slow_sync" in fault:
        sync = os.fsync
        os.fsync = lambda descriptor: (time.sleep(fault["slow_sync"]), sync(descriptor))[1]
    if fault.get("no_override"):
        drop_override()
    for name, value in fault.get("constants", {}).items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)


def signal_after_calls(number: int, function: str, count: int, further: int) -> None:
    """Send a signal at a point that depends only on the program, not on the load of the machine.

    Calls are counted only from the start of training, because counting is slow.
    """
    process, seen, rest = os.getpid(), 0, -1

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal seen, rest
        if os.getpid() != process:
            sys.setprofile(None)  # a data worker forked from this process
        elif event == "call":
            if rest > 0:
                rest -= 1
            elif rest < 0 and frame.f_code.co_qualname == function:
                seen += 1
                rest = further if seen == count else -1
            if rest == 0:
                sys.setprofile(None)
                os.kill(process, number)

    def hook(name: str, arguments: tuple) -> None:
        if name == "open" and "metrics.csv" in str(arguments[0]) and os.getpid() == process and seen == 0:
            sys.setprofile(profile)

    sys.addaudithook(hook)


def signal_at_event(number: int, event: str, text: str, count: int) -> None:
    """Signal right before the system call of an audit event, such as the rename of a file."""
    process, seen = os.getpid(), 0

    def hook(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name == event and os.getpid() == process and text in str(arguments):
            seen += 1
            if seen == count:
                os.kill(process, number)

    sys.addaudithook(hook)


def spoil_worker(count: int, how: str) -> None:
    """Make a data worker die, as from the out-of-memory killer, or never answer again, at its n-th update."""
    seen = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal seen
        if event == "call" and frame.f_code.co_qualname == "_PlannedUpdates.__getitem__":
            seen += 1
            if seen == count and how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if seen == count:
                time.sleep(3600)

    sys.setprofile(profile)


def drop_override() -> None:
    """Drop root's privilege to ignore file permissions; does nothing for other users."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("Ii", CAPABILITY_VERSION, 0))
    data = ctypes.create_string_buffer(24)
    if libc.capget(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    sets = list(struct.unpack("6I", data.raw[:24]))
    sets[0] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
    if libc.capset(header, ctypes.create_string_buffer(struct.pack("6I", *sets))) != 0:
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    sys.exit(serve())
