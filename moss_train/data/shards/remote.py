"""Packed folders behind a URL (`https://`, `s3://`, `hf://`, whatever fsspec opens), through a bounded local cache.

A shard is fetched as a whole when its first clip is read, and checked against the index. When the cache is full, the
least recently used shard is deleted. Processes share the cache.
"""

import errno
import hashlib
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moss_train.utils.errors import UserError
from moss_train.utils.files import file_lock

CACHE_VARIABLE = "MOSS_TRAIN_CACHE"
"""Environment variable for the folder of the cache; the default is `~/.cache/moss_train`."""

CACHE_GB_VARIABLE = "MOSS_TRAIN_CACHE_GB"
"""Environment variable for the maximum size of fetched shards in gigabytes; the default is 50."""

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0  # doubled after every attempt
SILENCE_SECONDS = 60.0  # a connection that delivers nothing for this long is given up
ABANDONED_SECONDS = 3600.0  # a partly fetched file that has not grown for this long is of a process that was killed

_PART = ".part-"  # in the names of files that are being fetched
_SCHEME = re.compile(r"[a-z][a-z0-9+]*://")


def is_remote(place: str | Path) -> bool:
    """Return whether a place is a URL."""
    return isinstance(place, str) and _SCHEME.match(place) is not None


def fetch_index(url: str, name: str) -> Path:
    """Fetch the index file of a remote folder, cached or not, and return the local folder with it. Raises UserError."""
    folder = _folder_of(url)
    with _locked(folder / name):
        try:
            _fetch(f"{url.rstrip('/')}/{name}", folder / name)
        except OSError as error:
            raise UserError(f"{url} is not a folder of packed shards that can be read: {error}") from error
    return folder


def fetch_arrays(url: str, name: str, sha256: str) -> Path:
    """Return the local copy of the arrays with this hash, fetched first if there is none. Raises OSError."""
    path = _local_path(f"{url.rstrip('/')}/{name}", sha256)
    with _locked(path):
        if not path.exists():
            _fetch(f"{url.rstrip('/')}/{name}", path, sha256=sha256)
            for other in path.parent.glob(f"*-{name}"):
                if other != path:
                    other.unlink()  # of an earlier version of the folder; processes that have it open keep it
    return path


def open_shard(url: str, size: int, sha256: str) -> int:
    """Return an open file descriptor of the local copy of a shard, fetched and checked first if there is none.

    It stays readable when the copy is deleted. Raises OSError.
    """
    path = _local_path(url, sha256)
    with _locked(path):  # until the copy is open, because a locked copy is never deleted
        if not path.exists():
            _evict_until_fits(size)
            _fetch(url, path, size, sha256)
        os.utime(path)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _local_path(url: str, sha256: str) -> Path:
    """Return the path of a file in the cache. Its name contains the hash, so files of other versions are never used.

    File name and hash come from the index, which anyone may have written; neither may lead out of the cache.
    """
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise OSError(errno.EINVAL, f"{url}: {sha256!r} is not a hash")
    parent, _, name = url.rpartition("/")
    return _folder_of(parent) / f"{sha256[:16]}-{name}"


def _cache() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/moss_train").expanduser() / "shards"


def _folder_of(url: str) -> Path:
    return _cache() / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:24]


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Let one process at a time fetch or delete a file. Without `wait`, raises UserError if another one is doing so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_name(f".{path.name}.lock"), str(path), math.inf if wait else 0.0):
        yield


def _evict_until_fits(size: int) -> None:
    """Delete the least recently used shards until one of `size` bytes fits.

    Raises OSError if it never fits, UserError for an invalid CACHE_GB_VARIABLE.
    """
    text = os.environ.get(CACHE_GB_VARIABLE, "50")
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise UserError(f"{CACHE_GB_VARIABLE}={text} has to be a number of gigabytes above 0")
    if size > limit:
        raise OSError(errno.ENOSPC, f"a shard has {size:,} bytes, more than {CACHE_GB_VARIABLE} allows ({limit:,})")
    files, total = [], 0
    for path in (*_cache().glob("*/*.tar"), *_cache().glob(f"*/.*{_PART}*")):
        try:
            status = path.stat()
            if _PART not in path.name:
                files.append((status.st_mtime_ns, status.st_size, path))
            elif time.time() - status.st_mtime > ABANDONED_SECONDS:
                path.unlink()
                continue
        except OSError:
            continue  # another process was faster
        total += status.st_size
    for _, length, path in sorted(files):
        if total + size <= limit:
            return
        with suppress(UserError), _locked(path, wait=False):
            path.unlink(missing_ok=True)
            total -= length


def _fetch(url: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Fetch a file, complete and checked or not at all, in up to ATTEMPTS attempts. Raises OSError naming the URL."""
    temporary = path.with_name(f".{path.name}{_PART}{os.getpid()}")
    try:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _download(url, temporary, size, sha256)
                break
            except FileNotFoundError as error:
                raise FileNotFoundError(errno.ENOENT, f"{url} does not exist") from error
            except ImportError as error:
                raise OSError(errno.ENOPKG, f"{url} needs another package: {error}") from error
            except Exception as error:  # every file system of fsspec has exceptions of its own
                if attempt == ATTEMPTS:
                    reason = str(error) or type(error).__name__
                    raise OSError(errno.EIO, f"{url} after {ATTEMPTS} attempts: {reason}") from error
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _download(url: str, path: Path, size: int | None, sha256: str | None) -> None:
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
        options = {"client_kwargs": {"timeout": timeout}, "block_size": 0}  # 0: read as a stream, not by ranges
    digest, count = hashlib.sha256(), 0
    with fsspec.open(url, "rb", **options) as source, path.open("wb") as target:
        while chunk := source.read(2**20):
            digest.update(chunk)
            target.write(chunk)
            count += len(chunk)
    if size is not None and count != size:
        raise OSError(errno.EIO, f"{count} bytes came, the index says {size}")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise OSError(errno.EIO, "the hash differs from the index")
