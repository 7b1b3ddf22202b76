"""Atomic writes, file locks and readable file errors."""

import errno
import fcntl
import os
import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moss_train.utils.errors import UserError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it takes the place of `path` when the block ends without error.

    The temporary name keeps the suffix, because writers choose the format by it. Missing folders are made. An OSError
    names `path`, as that of a full disk does not by itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes in containers on several machines may have the same number.
    temporary = path.with_name(f".{os.getpid()}.{secrets.token_hex(4)}.{path.name}")
    try:
        with naming(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put a path into an OSError of the block that says nothing about where: a full disk, say, while writing."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


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


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is one: "1 shard", "2,663 clips"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
