"""One process at a time."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moss_train.utils.errors import UserError


@contextmanager
def exclusive(path: Path, what: str, patience_seconds: float = 10.0) -> Iterator[None]:
    """Hold a lock file; the system releases it when the process ends, however it ends.

    It waits a little, because workers of a killed process hold it until they notice.

    Args:
        path: lock file; its folder must exist.
        what: what is locked, for the message.

    Raises:
        UserError: another process holds the lock.
    """
    deadline = time.monotonic() + patience_seconds
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{what} is in use by another process: wait for it, stop it, or choose another name"
                    ) from None
                time.sleep(0.1)
        yield
