"""Evaluation clips from folders, manifests and shards."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from moss_train.audio import audio_info, read_audio
from moss_train.data.index import INDEX_FILE, ClipLocation, ShardIndex
from moss_train.data.manifest import list_clips
from moss_train.data.reading import ClipReader, SampleError
from moss_train.evaluation.rendering import EvaluationClip
from moss_train.utils.errors import UserError

_LABELS = ("text", "task", "language", "speaker")


@dataclass(frozen=True)
class FileClip:
    """Reads an audio file, or a piece of it."""

    path: Path
    start: int = 0
    num_samples: int | None = None

    def __call__(self) -> tuple[Tensor, int]:
        """Audio [C, T] and its rate in Hz."""
        return read_audio(self.path, start=self.start, num_frames=self.num_samples)

    def length(self) -> tuple[int, int]:
        """Samples and rate in Hz."""
        info = audio_info(self.path)
        return info.num_samples, info.sampling_rate


@dataclass(frozen=True)
class ShardClip:
    """Reads a clip of a shard, or a piece of it."""

    reader: ClipReader
    rate: int
    location: ClipLocation
    start: int = 0
    num_samples: int | None = None

    def __call__(self) -> tuple[Tensor, int]:
        """Audio [C, T] and its rate in Hz."""
        wanted = self.location.num_samples - self.start if self.num_samples is None else self.num_samples
        try:
            return self.reader.read_audio(self.location, self.start, wanted), self.rate
        except SampleError as error:
            raise UserError(f"{self.location.shard}, clip at byte {self.location.audio_offset}: {error}") from error

    def length(self) -> tuple[int, int]:
        """Samples and rate in Hz."""
        return self.location.num_samples, self.rate


def find_clips(sources: Sequence[str], domain: str) -> list[EvaluationClip]:
    """All clips of all sources in their order. Raises UserError for what cannot be listed and for an id given twice."""
    clips: dict[str, EvaluationClip] = {}
    for source in map(Path, sources):
        found = _shard_clips(source) if (source / INDEX_FILE).is_file() else _listed_clips(source, domain)
        for clip in found:
            if clip.id in clips:
                raise UserError(f"data={source}: the clip {clip.id!r} is in an earlier source too; give each an id")
            clips[clip.id] = clip
    return list(clips.values())


def _listed_clips(source: Path, domain: str) -> Iterator[EvaluationClip]:
    for clip in list_clips(source.expanduser(), domain).clips:
        labels = {key: value for key, value in clip.labels().items() if key in _LABELS}
        yield EvaluationClip(clip.id, clip.domain, FileClip(clip.path), labels)


def _shard_clips(source: Path) -> Iterator[EvaluationClip]:
    index = ShardIndex.load(source)
    reader = ClipReader(index.sampling_rate, index.num_channels)
    for row in range(len(index)):
        location = index.locate(row)
        try:
            stored = reader.read_labels(location)
        except SampleError as error:
            raise UserError(f"{location.shard}, clip at byte {location.json_offset}: {error}") from error
        labels = {key: stored[key] for key in _LABELS if key in stored}
        read = ShardClip(reader, index.sampling_rate, location)
        yield EvaluationClip(stored["id"], stored["domain"], read, labels)


def cut_clips(clips: Sequence[EvaluationClip], seconds: float | None) -> list[EvaluationClip]:
    """Pieces of equal length without overlap; what is left of a clip is dropped, and texts, which no longer fit."""
    return list(clips) if seconds is None else [piece for clip in clips for piece in _pieces(clip, seconds)]


def _pieces(clip: EvaluationClip, seconds: float) -> Iterator[EvaluationClip]:
    assert isinstance(clip.read, FileClip | ShardClip)
    try:
        num_samples, rate = clip.read.length()
    except UserError:
        yield clip  # reading it will fail again, and then it is counted
        return
    length = round(seconds * rate)
    labels = {key: value for key, value in clip.labels.items() if key not in ("text", "task")}
    for index in range(num_samples // length):
        read = replace(clip.read, start=index * length, num_samples=length)
        yield EvaluationClip(f"{clip.id}@{index * seconds:g}s", clip.domain, read, labels)


def choose_clips(clips: Sequence[EvaluationClip], per_domain: int | None, seed: int) -> list[EvaluationClip]:
    """At most so many clips of every domain, in their order; the choice depends on ids and seed only."""
    if per_domain is None:
        return list(clips)
    kept: set[str] = set()
    for domain in {clip.domain for clip in clips}:
        members = [clip.id for clip in clips if clip.domain == domain]
        kept |= set(sorted(members, key=lambda id: hashlib.sha256(f"{seed} {id}".encode()).digest())[:per_domain])
    return [clip for clip in clips if clip.id in kept]
