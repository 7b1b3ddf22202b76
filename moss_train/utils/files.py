"""Files that are either complete or not there."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
