"""Progress log of an unfinished folder, so that a killed job resumes after its last finished shard."""

import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moss_train.data.pack.manifest import SourceClip
from moss_train.data.shards.format import ShardContents, read_shard
from moss_train.utils.errors import Fault
from moss_train.utils.files import file_lock, parse_json

JOURNAL_FILE = "journal.jsonl"


@dataclass(frozen=True)
class FinishedShard:
    """One line of the journal; the fields have the same names in the file."""

    file: str
    domain: str
    last: int  # number of the last clip of its domain that was processed before the shard was closed
    inputs: str  # hash of everything that determines the content of the shard
    sha256: str
    left_out: dict[str, int]  # skipped clips by kind, since the domain's previous shard
    bad: list[list[str]]  # clip id, reason and kind of fault, likewise
    remarks: dict[str, int] = field(default_factory=dict)  # packed clips by remark about them, likewise


def read_journal(folder: Path) -> list[FinishedShard]:
    """Return the complete lines of an unfinished folder's journal; a kill may have cut the last one short."""
    path, shards = folder / JOURNAL_FILE, []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            shard = FinishedShard(**parse_json(line, "a line of the journal"))
            shards.append(replace(shard, bad=[[*bad, Fault.OTHER][:3] for bad in shard.bad]))
        except (ValueError, TypeError):
            break
    return shards


def write_journal(folder: Path, shards: Iterable[FinishedShard], *, anew: bool = False) -> None:
    """Append lines to the journal, or, with `anew`, replace its content with them; sync it to disk."""
    with (folder / JOURNAL_FILE).open("wb" if anew else "ab") as file:
        file.writelines(json.dumps(asdict(shard)).encode() + b"\n" for shard in shards)
        file.flush()
        os.fsync(file.fileno())


class ShardInputs:
    """The inputs of one shard so far: the clips that were processed, whether stored or skipped."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.last = -1
        self.left_out: Counter[str] = Counter()
        self.bad: list[list[str]] = []
        self.remarks: Counter[str] = Counter()
        self.digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())

    def add(self, number: int, clip: SourceClip) -> None:
        """Add one clip to the hash, with the size and modification time of its file."""
        try:
            status = clip.path.stat()
            state = (status.st_size, status.st_mtime_ns)
        except OSError:
            state = (-1, -1)
        self.last = number
        self.digest.update(repr((number, clip, state)).encode("utf-8", "surrogateescape"))


def reuse_finished_shards(
    folder: Path, clips: Sequence[SourceClip], settings: dict[str, Any], sampling_rate: int
) -> list[tuple[FinishedShard, ShardContents]]:
    """Return the shards of an earlier attempt that this one would make just the same; delete everything else.

    Each is read and compared with its recorded hash. After a shard that does not match, the later ones of its domain
    are deleted, too.
    """
    kept: list[tuple[FinishedShard, ShardContents]] = []
    ends: dict[str, int] = {}
    broken: set[str] = set()
    for shard in read_journal(folder):
        if shard.domain in broken:
            continue
        broken.add(shard.domain)  # until the checks below show that the shard can be reused
        inputs = ShardInputs(settings)
        for number in range(ends.get(shard.domain, -1) + 1, min(shard.last + 1, len(clips))):
            if clips[number].domain == shard.domain:
                inputs.add(number, clips[number])
        if shard.inputs != inputs.digest.hexdigest():
            continue
        try:
            contents = read_shard(folder / shard.file, sampling_rate)
        except (OSError, ValueError, tarfile.TarError):
            continue
        if contents.sha256 == shard.sha256:
            broken.discard(shard.domain)
            kept.append((shard, contents))
            ends[shard.domain] = shard.last
    if kept:
        write_journal(folder, (shard for shard, _ in kept), anew=True)
    names = {shard.file for shard, _ in kept} | ({JOURNAL_FILE} if kept else set())
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    return kept


def unfinished_folder(target: Path) -> Path:
    """Return the folder in which the shards of `target` are made before it appears."""
    target = target.resolve()
    return target.parent / f".{target.name}.partial"


@contextmanager
def resumable_directory(target: Path) -> Iterator[Path]:
    """Yield a working folder beside `target`, and rename it to `target` if the block ends without error.

    After an error or a kill the folder stays, and the next call yields it again; after an error without any finished
    shard it is deleted. Raises UserError when another process is working on it.
    """
    target, folder = target.resolve(), unfinished_folder(target)
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder, str(target), 0.0):
        try:
            yield folder
        except BaseException:
            if not (folder / JOURNAL_FILE).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        (folder / JOURNAL_FILE).unlink(missing_ok=True)
        replaced = target.parent / f".{target.name}.replaced-{os.getpid()}"
        if target.exists():
            target.rename(replaced)
        try:
            folder.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
