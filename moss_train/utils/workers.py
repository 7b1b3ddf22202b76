"""What the workers of every pool of processes have in common."""

import multiprocessing
import os
import signal
import threading


def end_with_pool() -> None:
    """In a worker of a pool: Ctrl-C ends the parent, which ends its workers; none outlives a killed parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_starter, daemon=True).start()


def _end_with_starter() -> None:
    """The parent of a worker may be a fork server, so what counts is the process that wanted it."""
    starter = multiprocessing.parent_process()
    assert starter is not None
    starter.join()
    os._exit(1)
