"""One process at a time."""

import errno
import fcntl
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moss_train.utils.errors import UserError

WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # Lustre and NFS, as they may be mounted


@contextmanager
def exclusive(path: Path, what: str, patience_seconds: float = 10.0) -> Iterator[None]:
    """Hold a lock file; the system releases it when the process ends, however it ends.

    It waits a little, because workers of a killed process hold it until they notice. On a file system without locks it
    warns and goes on.

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
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                warnings.warn(
                    f"the file system of {path} has no locks: nothing keeps a second process out", stacklevel=3
                )
                break
        yield
