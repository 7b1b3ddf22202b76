"""Read samples out of shards by seek, and check everything about them: a bad sample is reported, never let through."""

import io
import json
import math
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moss_train.audio import read_audio
from moss_train.data.corpus import Corpus
from moss_train.data.index import ClipLocation
from moss_train.data.loudness import loudness, power_spectrum
from moss_train.data.remote import is_remote, open_shard
from moss_train.data.stream import ClipFormat, SampleRef
from moss_train.types import TASKS
from moss_train.utils.errors import UserError

TextEncoder = Callable[[str], Sequence[int]]

_READ_BYTES = 2**18  # at once, so that a clip is read in one go and a crop of a long file costs no more than this
_MAX_JSON_BYTES = 2**20
MAX_GAIN_DB = 30.0
"""Most that loudness normalisation changes a clip: what is quieter is not what it should be."""

_OPEN_REMOTE = 8  # an open file takes space after the cache has deleted it


class SampleError(ValueError):
    """One sample cannot be used; the message says why."""


@dataclass(frozen=True)
class TrainingClip:
    """One sample of the stream as it was read."""

    ref: SampleRef
    sample_id: str
    audio: Tensor  # [C, T] float32
    tokens: tuple[int, ...]  # empty for a clip without text
    task_id: int  # -1 for a clip without text


class OpenFiles:
    """Keeps the last few shards open; reads by offset, so processes may share the descriptors after a fork."""

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def descriptor(self, location: ClipLocation) -> int:
        """Return an open descriptor of a clip's shard. Raises OSError, or SampleError for a shard of another size."""
        path = location.shard
        if path not in self._descriptors:
            remote = is_remote(path)
            self._descriptors[path] = _open_remote(location) if remote else _open_local(location)
            if len(self._descriptors) > (min(self._capacity, _OPEN_REMOTE) if remote else self._capacity):
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(path)
        return self._descriptors[path]

    def close(self) -> None:
        """Close every file."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict:
        return {"_capacity": self._capacity, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        self.close()


def _open_remote(location: ClipLocation) -> int:
    return open_shard(location.shard, location.shard_bytes, location.shard_sha256)


def _open_local(location: ClipLocation) -> int:
    descriptor = os.open(location.shard, os.O_RDONLY | os.O_CLOEXEC)
    found = os.fstat(descriptor).st_size
    if found != location.shard_bytes:
        os.close(descriptor)
        raise SampleError(f"{location.shard} has {found} bytes, the index says {location.shard_bytes}")
    return descriptor


class _Member(io.RawIOBase):
    """One member of a tar as a file of its own."""

    def __init__(self, descriptor: int, offset: int, size: int, name: str) -> None:
        self._descriptor, self._offset, self._size, self._position = descriptor, offset, size, 0
        self.name = name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        count = os.preadv(self._descriptor, [view], self._offset + self._position)
        self._position += count
        return count


class ClipReader:
    """Reads and checks clips of shards that have one sampling rate and number of channels."""

    def __init__(self, sampling_rate: int, num_channels: int) -> None:
        self._sampling_rate = sampling_rate
        self._num_channels = num_channels
        self._files = OpenFiles()

    def check_headers(self, location: ClipLocation) -> None:
        """Compare the tar headers in front of a clip's two members with the index. Raises SampleError."""
        members = (
            (location.audio_offset, location.audio_size, ".flac"),
            (location.json_offset, location.json_size, ".json"),
        )
        for offset, size, suffix in members:
            try:
                block = os.pread(self._files.descriptor(location), tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except OSError as error:
                raise SampleError(f"cannot read {location.shard}: {error.strerror}") from error
            except tarfile.HeaderError as error:
                raise SampleError(f"damaged tar header in front of byte {offset} ({error})") from error
            if not header.isreg():
                raise SampleError(f"{header.name} is not a file of the tar, but of type {header.type!r}")
            if header.size != size or not header.name.endswith(suffix):
                raise SampleError(
                    f"tar header says {header.name} with {header.size} bytes, the index {suffix} with {size}"
                )

    def read_labels(self, location: ClipLocation) -> dict:
        """Read and check a clip's JSON. Raises SampleError."""
        if location.json_size > _MAX_JSON_BYTES:
            raise SampleError(f"JSON has {location.json_size} bytes, more than {_MAX_JSON_BYTES}")
        try:
            content = os.pread(self._files.descriptor(location), location.json_size, location.json_offset)
            labels = json.loads(content)
        except OSError as error:
            raise SampleError(f"cannot read {location.shard}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise SampleError(f"damaged JSON ({error})") from error
        self._check_labels(labels, location)
        return labels

    def read_audio(self, location: ClipLocation, start: int, num_frames: int) -> Tensor:
        """Read a part of a clip as float32 [C, T]. Raises SampleError."""
        try:
            descriptor = self._files.descriptor(location)
            name = f"{location.shard} at byte {location.audio_offset}"
            member = _Member(descriptor, location.audio_offset, location.audio_size, name)
            to_end = start + num_frames == location.num_samples  # then a file longer than its index is noticed too
            file = io.BufferedReader(member, _READ_BYTES)
            audio, rate = read_audio(file, start=start, num_frames=None if to_end else num_frames)
        except OSError as error:
            raise SampleError(f"cannot read {location.shard}: {error.strerror}") from error
        except UserError as error:
            raise SampleError(str(error)) from error
        found, wanted = (rate, *audio.shape), (self._sampling_rate, self._num_channels, num_frames)
        if found != wanted:
            raise SampleError(f"rate, channels and length are {found}, the index says {wanted}")
        return audio

    def _check_labels(self, labels: object, location: ClipLocation) -> None:
        if not isinstance(labels, dict) or not isinstance(labels.get("id"), str):
            raise SampleError("JSON without an id")
        found = (labels.get("sampling_rate"), labels.get("num_samples"), "text" in labels)
        wanted = (self._sampling_rate, location.num_samples, location.has_text)
        if found != wanted:
            raise SampleError(f"JSON says rate, length and text {found}, the index says {wanted}")
        if location.has_text and (not isinstance(labels["text"], str) or labels.get("task") not in TASKS):
            raise SampleError(f"text without a known task: {labels.get('task')!r}")


class SampleReader:
    """Turns references into clips that are ready for training."""

    def __init__(self, clip_format: ClipFormat, text_encoder: TextEncoder | None) -> None:
        self._clips = ClipReader(clip_format.sampling_rate, clip_format.num_channels)
        self._format = clip_format
        self._text_encoder = text_encoder

    def read(self, ref: SampleRef) -> TrainingClip:
        """Read one sample. Raises SampleError, its first argument the reason, its second the sample's id."""
        sample_id = f"{Path(ref.location.shard).name}@{ref.location.audio_offset}"
        try:
            self._clips.check_headers(ref.location)
            labels = self._clips.read_labels(ref.location)
            sample_id = labels["id"]
            audio = self._clips.read_audio(ref.location, ref.start, ref.num_frames)
            tokens = self._encode(labels["text"]) if ref.with_text else ()
        except SampleError as error:
            raise SampleError(str(error), sample_id) from error
        task_id = TASKS.index(labels["task"]) if tokens else -1
        return TrainingClip(ref, sample_id, adjust_level(audio, self._format, ref.gain_unit), tokens, task_id)

    def _encode(self, text: str) -> tuple[int, ...]:
        if self._text_encoder is None:
            return ()
        try:
            tokens = tuple(self._text_encoder(text))
        except Exception as error:  # whatever a tokenizer raises for odd text must not stop the run
            raise SampleError(f"the text encoder raised {type(error).__name__}: {error}") from error
        if not tokens:
            raise SampleError("the text encoder gives no tokens")
        return tokens


def adjust_level(audio: Tensor, clip_format: ClipFormat, gain_unit: float) -> Tensor:
    """Bring audio [C, T] to the level that a format asks for; silence stays silent, nothing exceeds full scale."""
    audio = scale_to_peak(audio, clip_format.peak)
    gain_db = 0.0
    if clip_format.loudness_lufs is not None:
        wanted = clip_format.loudness_lufs - loudness(power_spectrum(audio), clip_format.sampling_rate)
        gain_db = min(max(wanted, -MAX_GAIN_DB), MAX_GAIN_DB) if math.isfinite(wanted) else 0.0
    if clip_format.gain_db is not None:
        lowest, highest = clip_format.gain_db
        gain_db += lowest + (highest - lowest) * gain_unit
    if gain_db == 0 or not (peak := audio.abs().max().item()):
        return audio
    return audio * min(10 ** (gain_db / 20), max(1.0, 1 / peak) if gain_db > 0 else 1.0)


def scale_to_peak(audio: Tensor, peak: float | None) -> Tensor:
    """Scale audio to a highest absolute sample; silence stays silent, None changes nothing."""
    if peak is None or audio.numel() == 0:
        return audio
    highest = audio.abs().max()
    return audio * (peak / highest) if highest > 0 else audio


def iterate_clips(
    sources: Sequence[str | Path], *, sampling_rate: int, num_channels: int, peak: float | None = None
) -> Iterator[tuple[str, Tensor, dict]]:
    """Yield the id, the whole audio [C, T] and the JSON of every clip, in the order of the index.

    Raises UserError, naming shard and clip, for a clip that cannot be read: an evaluation must not lose any.
    """
    corpus = Corpus.load(sources, sampling_rate=sampling_rate, num_channels=num_channels)
    reader = ClipReader(sampling_rate, num_channels)
    for row in range(len(corpus)):
        location = corpus.locate(row)
        try:
            reader.check_headers(location)
            labels = reader.read_labels(location)
            audio = reader.read_audio(location, 0, location.num_samples)
        except SampleError as error:
            raise UserError(f"{location.shard}, clip at byte {location.audio_offset}: {error}") from error
        yield labels["id"], scale_to_peak(audio, peak), labels
