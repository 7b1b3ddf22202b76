"""Pack a folder or a manifest into shards: a FLAC and a JSON per clip, a domain per shard, nothing half-written."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moss_train.audio import read_audio, resample
from moss_train.data.index import INDEX_FILE, IndexBuilder
from moss_train.data.manifest import SourceClip, SourceList
from moss_train.data.shards import ShardWriter, read_shard
from moss_train.utils.errors import UserError

RATE_LIMITS = (2000, 768_000)
"""Sampling rates in Hz that are believed; anything else is a damaged header."""

PEAK_LIMIT = 8.0
"""Highest believed absolute sample: more is not audio in [-1, 1] with overs but, say, integers in a float file."""


@dataclass(frozen=True)
class PackOptions:
    """How clips are stored and which are left out."""

    sampling_rate: int = 24000
    num_channels: int = 1
    min_seconds: float = 0.1  # shorter clips are left out
    shard_bytes: int = 256 * 2**20  # a shard is closed once it has this size
    max_bad_share: float = 0.0  # share of unreadable files beyond which packing stops

    def __post_init__(self) -> None:
        if not RATE_LIMITS[0] <= self.sampling_rate <= RATE_LIMITS[1]:
            raise UserError(f"sampling_rate={self.sampling_rate} is outside {RATE_LIMITS[0]} to {RATE_LIMITS[1]} Hz")
        if self.num_channels < 1 or self.min_seconds < 0 or self.shard_bytes < 1:
            raise UserError("num_channels and shard_bytes have to be at least 1, min_seconds at least 0")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"max_bad_share={self.max_bad_share} has to be between 0 and 1")


@dataclass(frozen=True)
class PackReport:
    """What was packed and what was not."""

    index: dict  # content of index.json
    too_short: int
    bad: tuple[tuple[str, str], ...]  # (clip id, reason) of unreadable files
    ignored: dict[str, int]  # suffixes or manifest keys without effect


def pack(
    sources: SourceList,
    target: Path,
    options: PackOptions,
    *,
    overwrite: bool = False,
    on_clip: Callable[[float], None] = lambda seconds: None,
) -> PackReport:
    """Pack every clip of a list into a new folder of shards with an index.

    `on_clip` hears the seconds of every clip, 0 when it was left out. The folder appears under its name when it is
    complete, and not at all otherwise. Raises UserError, naming the file or line, for input that cannot be packed.
    """
    check_target(target, overwrite)
    with _finished_or_removed(target) as folder:
        packer = _Packer(folder, options)
        try:
            for number, clip in enumerate(sources.clips):
                on_clip(packer.add(clip, key=f"{number:09d}", num_clips=len(sources.clips)))
            index = packer.finish(sources.source)
        finally:
            packer.abandon()
    return PackReport(index, packer.too_short, tuple(packer.bad), sources.ignored)


class _Packer:
    """Sorts clips into one open shard per domain and indexes every shard as it is closed."""

    def __init__(self, folder: Path, options: PackOptions) -> None:
        self.too_short = 0
        self.bad: list[tuple[str, str]] = []
        self._folder = folder
        self._options = options
        self._open: dict[str, ShardWriter] = {}
        self._num_shards: Counter[str] = Counter()
        self._index = IndexBuilder(options.sampling_rate, options.num_channels)

    def add(self, clip: SourceClip, key: str, num_clips: int) -> float:
        """Pack one clip and return its seconds, 0 when it is left out."""
        try:
            audio = load_clip(clip, self._options)
        except UserError as error:
            self.bad.append((clip.id, str(error)))
            if len(self.bad) > self._options.max_bad_share * num_clips:
                raise UserError(self._too_many_bad(str(error))) from error
            return 0.0
        seconds = audio.shape[-1] / self._options.sampling_rate
        if seconds < self._options.min_seconds or seconds == 0:
            self.too_short += 1
            return 0.0
        writer = self._writer(clip.domain)
        writer.write(key, audio, {"id": clip.id, **clip.labels()})
        if writer.num_bytes >= self._options.shard_bytes:
            self._close(clip.domain)
        return seconds

    def finish(self, source: Path) -> dict:
        """Close the last shards, write the index and return its content."""
        for domain in list(self._open):
            self._close(domain)
        if not self._num_shards:
            minimum = f"min_seconds={self._options.min_seconds}"
            raise UserError(
                f"input={source}: nothing to pack, {self.too_short} clips are shorter than {minimum} "
                f"and {len(self.bad)} could not be read"
            )
        return self._index.write(self._folder)

    def abandon(self) -> None:
        """Let go of shards that are still open after an error."""
        while self._open:
            self._open.popitem()[1].abandon()

    def _too_many_bad(self, last: str) -> str:
        share = self._options.max_bad_share
        if share == 0:
            return f"{last}; repair or remove it, or leave such files out with max_bad_share=0.01"
        return f"{len(self.bad)} files could not be read, more than max_bad_share={share} allows; the last: {last}"

    def _writer(self, domain: str) -> ShardWriter:
        if domain not in self._open:
            path = self._folder / f"{domain}-{self._num_shards[domain]:06d}.tar"
            self._open[domain] = ShardWriter(path, self._options.sampling_rate)
            self._num_shards[domain] += 1
        return self._open[domain]

    def _close(self, domain: str) -> None:
        writer = self._open.pop(domain)
        writer.close()
        contents = read_shard(writer.path, self._options.sampling_rate)
        if len(contents.labels) != writer.num_clips:
            raise OSError(f"{writer.path}: {len(contents.labels)} of {writer.num_clips} clips came back after writing")
        self._index.add(writer.path.name, domain, contents)


def load_clip(clip: SourceClip, options: PackOptions) -> Tensor:
    """Read one clip as it will be stored, float32 [C, T]. Raises UserError, naming the file, for implausible audio."""
    audio, rate = read_audio(clip.path, num_channels=options.num_channels)
    if not RATE_LIMITS[0] <= rate <= RATE_LIMITS[1]:
        raise UserError(f"{clip.path} has a sampling rate of {rate} Hz, outside {RATE_LIMITS[0]} to {RATE_LIMITS[1]}")
    peak = audio.abs().max().item() if audio.numel() else 0.0
    if peak > PEAK_LIMIT:
        raise UserError(f"{clip.path} has samples up to {peak:.3g}; audio has to lie in [-1, 1]")
    return audio if rate == options.sampling_rate else resample(audio, rate, options.sampling_rate)


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse to touch anything but an empty or missing folder or, with `overwrite`, an earlier result."""
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise UserError(f"out={target} exists and is not a folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"out={target} exists and is not empty; give another folder or overwrite=true")
    if not (target / INDEX_FILE).is_file():
        raise UserError(f"out={target} is not a folder of packed shards; overwrite=true does not replace it")


@contextmanager
def _finished_or_removed(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target`, which gets its name at the end or is removed on any error or Ctrl-C."""
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.partial-{os.getpid()}"
    replaced = target.parent / f".{target.name}.replaced-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
