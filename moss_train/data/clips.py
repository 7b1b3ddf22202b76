"""List clips of folders, manifests and shards for evaluation and encoding; audio is read lazily."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from moss_train.audio.io import read_audio
from moss_train.batch import ListedClip
from moss_train.data.pack.manifest import SourceClip, list_clips
from moss_train.data.pack.preprocess import find_extent
from moss_train.data.shards.index import INDEX_FILE, ClipLocation, ShardIndex
from moss_train.data.stream.sample_reader import ClipReader, scale_to_peak
from moss_train.utils.errors import InvalidSample, SampleError, UserError

_LABELS = ("text", "task", "language", "speaker")


@dataclass(frozen=True)
class FileClip:
    """Reads a clip of a folder or manifest, or a piece of it."""

    clip: SourceClip
    start: int = 0
    num_samples: int | None = None

    def __call__(self) -> tuple[Tensor, int]:
        """Return the audio [C, T] and its rate in Hz."""
        extent = find_extent(self.clip)
        num_samples = extent.num_samples - self.start if self.num_samples is None else self.num_samples
        return read_audio(extent.source, start=extent.begin + self.start, num_samples=num_samples)

    def length(self) -> tuple[int, int]:
        """Return the number of samples and the rate in Hz."""
        extent = find_extent(self.clip)
        return extent.num_samples, extent.rate


@dataclass(frozen=True)
class UnreadableClip:
    """Stands for a line or file that is not a clip; it is counted like a clip that cannot be read."""

    invalid: InvalidSample

    def __call__(self) -> tuple[Tensor, int]:
        """Raise SampleError."""
        raise SampleError(self.invalid.fault, self.invalid.reason, self.invalid.name)


@dataclass(frozen=True)
class ShardClip:
    """Reads a clip of a shard, or a piece of it."""

    reader: ClipReader
    rate: int
    location: ClipLocation
    start: int = 0
    num_samples: int | None = None

    def __call__(self) -> tuple[Tensor, int]:
        """Return the audio [C, T] and its rate in Hz. Raises SampleError."""
        wanted = self.location.num_samples - self.start if self.num_samples is None else self.num_samples
        try:
            return self.reader.read_audio(self.location, self.start, wanted), self.rate
        except SampleError as error:
            raise SampleError(
                error.fault, f"{self.location.shard}, clip at byte {self.location.audio_offset}: {error}"
            ) from error

    def length(self) -> tuple[int, int]:
        """Return the number of samples and the rate in Hz."""
        return self.location.num_samples, self.rate


@dataclass(frozen=True)
class ScaledClip:
    """Reads a clip and scales it so that its highest absolute sample is `peak`, as training does with `data.peak`."""

    read: Callable[[], tuple[Tensor, int]]
    peak: float

    def __call__(self) -> tuple[Tensor, int]:
        """Return the audio [C, T] and its rate in Hz; silence stays silent. Raises what `read` raises."""
        audio, rate = self.read()
        return scale_to_peak(audio, self.peak), rate


def list_sources(sources: Sequence[str], domain: str, key: str = "data") -> list[ListedClip]:
    """Return all clips of all sources in their order; `domain` is the domain of clips that do not state one.

    Raises UserError for a source that cannot be listed and for an id that occurs twice.
    """
    clips: dict[str, ListedClip] = {}
    for source in (Path(source).expanduser() for source in sources):
        found: list[ListedClip] = []
        if (source / INDEX_FILE).is_file():
            index = ShardIndex.load(source)
            reader = ClipReader(index.sampling_rate, index.num_channels)
            for location in map(index.locate, range(len(index))):
                try:
                    stored = reader.read_labels(location)
                except SampleError as error:
                    raise UserError(f"{location.shard}, clip at byte {location.json_offset}: {error}") from error
                read = ShardClip(reader, index.sampling_rate, location)
                found.append(ListedClip(stored["id"], stored["domain"], read, stored))
        else:
            listed = list_clips(source, domain, key)
            found += [ListedClip(bad.name, domain, UnreadableClip(bad)) for bad in listed.invalid]
            found += [ListedClip(clip.id, clip.domain, FileClip(clip), clip.labels()) for clip in listed.clips]
        for clip in found:
            if clip.id in clips:
                raise UserError(f"{key}={source}: the clip {clip.id!r} is in an earlier source too; give each an id")
            labels = {name: clip.labels[name] for name in _LABELS if name in clip.labels}
            clips[clip.id] = replace(clip, labels=labels)
    return list(clips.values())
