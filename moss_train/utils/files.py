"""Atomic writes, file locks, readable file errors, and where the files of the package lie."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import stat
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from moss_train.utils.errors import UserError, first_line

MAX_NAME_BYTES = 255  # longest file name in the file systems of Linux


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it replaces `path` when the block ends without error.

    The temporary name keeps the suffix, because writers choose the format by it. Missing folders are created. An
    OSError names `path`, even one that by itself names no file, as for a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes in containers on several machines may have the same process id.
    begin = f".{os.getpid()}.{secrets.token_hex(4)}."
    suffix = path.suffix if len(os.fsencode(path.suffix)) < 50 else ""
    room = MAX_NAME_BYTES - len(begin) - len(os.fsencode(suffix))
    temporary = path.with_name(begin + os.fsdecode(os.fsencode(path.name.removesuffix(suffix))[:room]) + suffix)
    try:
        with add_path_to_error(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def add_path_to_error(path: Path) -> Iterator[None]:
    """Add a path to an OSError of the block that names no file, such as that of a full disk while writing."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def special_kind(path: Path) -> str | None:
    """Return what a path is if it is not a regular file, such as "a named pipe"; None for a regular file.

    Raises FileNotFoundError when nothing is there.
    """
    try:
        return _SPECIAL.get(stat.S_IFMT(path.stat().st_mode))
    except OSError as error:
        if not path.is_symlink():
            raise
        is_missing = isinstance(error, FileNotFoundError)
        return "a link into nowhere" if is_missing else f"a link that leads nowhere ({error.strerror})"


@contextmanager
def file_lock(path: Path, what: str, timeout_seconds: float = 10.0) -> Iterator[None]:
    """Hold a lock file; the system releases it when the process ends, however it ends.

    It waits up to `timeout_seconds`, because workers of a killed process hold the lock until they notice the kill. On a
    file system without locks it warns and continues.

    Args:
        path: lock file, or a folder that is locked itself; the folder must exist.
        what: what is locked, for the message.

    Raises:
        UserError: another process holds the lock.
    """
    deadline = time.monotonic() + timeout_seconds
    descriptor = os.open(path, os.O_CLOEXEC | (os.O_RDONLY if path.is_dir() else os.O_WRONLY | os.O_CREAT), 0o666)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{what} is in use by another process: wait for it, stop it, or choose another name"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                # Lustre and NFS may be mounted without locks.
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                warnings.warn(
                    f"the file system of {path} has no locks: nothing keeps a second process out", stacklevel=3
                )
                break
        yield
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pluralize(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one: "1 shard", "2,663 clips"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """Return a text that is safe to print on a terminal: control characters are escaped, except newlines and tabs.

    File names, ids and labels are untrusted. An escape sequence in one could clear the screen, write into another
    window or hide the rest of a message; marks of writing direction could reverse a name.
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], str(text))


def warn(message: str) -> None:
    """Print a warning to stderr."""
    print(printable(f"warning: {message}"), file=sys.stderr, flush=True)


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table; bars in cells are escaped."""
    first, *others = [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)
    ]
    return [first, "|---" * len(header) + "|", *others]


MAX_JSON_BYTES = 2**31
"""Largest file that is read whole; the index of a million shards has a tenth of that."""


def read_json(path: Path) -> Any:
    """Read an untrusted JSON file: any other content than JSON, even endlessly nested, becomes one UserError.

    Raises:
        UserError: not a regular file, too large, or not JSON.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON_BYTES:
        raise UserError(f"{path} is not a file of at most {MAX_JSON_BYTES} bytes")
    return parse_json(path.read_bytes(), str(path))


MAX_YAML_BYTES = 2**22
MAX_YAML_VALUES = 100_000
"""Most values of a configuration, with every alias expanded."""


def read_yaml(path: Path) -> Any:
    """Read an untrusted YAML file: plain data, with a limit on its size and on the number of values after expansion.

    Raises:
        UserError: not plain YAML, too large, or a value that contains itself.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        if len(content) > MAX_YAML_BYTES or _num_values(yaml.compose(content, yaml.SafeLoader), {}) > MAX_YAML_VALUES:
            raise UserError(f"{path} has more than {MAX_YAML_BYTES} bytes or {MAX_YAML_VALUES} values")
        return yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not plain YAML ({' '.join(str(error).split())})") from error


def _num_values(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Return the number of values of a node with aliases expanded; infinite for a node that contains itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted: to meet it again means that it contains itself
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(node)]


def parse_json(content: str | bytes, place: str) -> Any:
    """Parse untrusted JSON. Raises UserError, naming `place`, for anything that cannot be parsed."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{place}: not JSON that can be read ({first_line(error)})") from error


def package_version(name: str) -> str | None:
    """Return the version of an installed package; None if it is not installed, or used from its source folder."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


PACKAGE_DIRECTORY = Path(__file__).resolve().parent.parent


def config_directory() -> Path:
    """Return the folder of the Hydra configs: inside the package in a wheel, at the repository root in a checkout.

    Raises:
        FileNotFoundError: neither folder exists, so the installation is incomplete.
    """
    candidates = (PACKAGE_DIRECTORY / "configs", PACKAGE_DIRECTORY.parent / "configs")
    for directory in candidates:
        if directory.is_dir():
            return directory
    raise FileNotFoundError(f"no configs folder at {candidates[0]} or {candidates[1]}; install moss_train again")
