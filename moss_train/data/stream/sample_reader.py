"""Read samples out of shards by seek, check everything about them, and set their level.

An invalid sample is reported, never used.
"""

import math
import tarfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moss_train.audio.io import read_audio, resample
from moss_train.audio.loudness import loudness, power_spectrum
from moss_train.batch import TASKS, UpdateBatch
from moss_train.data.shards.format import MAX_LABEL_BYTES
from moss_train.data.shards.index import ClipLocation
from moss_train.data.shards.reader import ShardFiles
from moss_train.data.stream.stream import ClipFormat, SampleRef
from moss_train.utils.errors import Fault, SampleError, UserError
from moss_train.utils.files import parse_json

MAX_GAIN_DB = 30.0
"""Maximum gain or attenuation by loudness normalisation: a clip that needs more is probably not what it should be."""


def adjust_level(audio: Tensor, clip_format: ClipFormat, gain_uniform: float) -> Tensor:
    """Scale audio [C, T], as stored, to the level of a format; silence stays silent, no gain goes beyond full scale."""
    audio = scale_to_peak(audio, clip_format.peak)
    gain_db = 0.0
    if clip_format.loudness_lufs is not None:
        wanted = clip_format.loudness_lufs - loudness(power_spectrum(audio), clip_format.stored_rate)
        gain_db = min(max(wanted, -MAX_GAIN_DB), MAX_GAIN_DB) if math.isfinite(wanted) else 0.0
    if clip_format.gain_db is not None:
        lowest, highest = clip_format.gain_db
        gain_db += lowest + (highest - lowest) * gain_uniform
    if gain_db == 0 or not (peak := audio.abs().max().item()):
        return audio
    return audio * min(10 ** (gain_db / 20), max(1.0, 1 / peak) if gain_db > 0 else 1.0)


def scale_to_peak(audio: Tensor, peak: float | None) -> Tensor:
    """Scale audio so that its highest absolute sample is `peak`; silence stays silent, None changes nothing."""
    if peak is None or audio.numel() == 0:
        return audio
    highest = audio.abs().max()
    return audio * (peak / highest) if highest > 0 else audio


TextEncoder = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class TrainingClip:
    """One sample of the stream as it was read."""

    ref: SampleRef
    sample_id: str
    audio: Tensor  # [C, T] float32, as the encoder takes it
    tokens: tuple[int, ...]  # empty for a clip without text
    task_id: int  # -1 for a clip without text
    is_text_too_long: bool = False  # then the text is not used
    target: Tensor | None = None  # [C, T'] float32, where the decoder has its own sampling rate


class ClipReader:
    """Reads and checks clips of shards that have one sampling rate and number of channels."""

    def __init__(self, sampling_rate: int, num_channels: int) -> None:
        self._sampling_rate = sampling_rate
        self._num_channels = num_channels
        self._files = ShardFiles()

    def check_headers(self, location: ClipLocation) -> None:
        """Compare the tar headers in front of a clip's two members with the index. Raises SampleError."""
        audio = (location.audio_offset, location.audio_size, ".flac")
        text = (location.json_offset, location.json_size, ".json")
        for offset, size, suffix in (audio, text):
            try:
                self._files.fetch(location)
                block = self._files.read(location, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except OSError as error:
                raise SampleError(Fault.FILE, f"cannot read {location.shard}: {error.strerror}") from error
            except tarfile.HeaderError as error:
                reason = f"damaged tar header in front of byte {offset} ({error})"
                raise SampleError(Fault.TAR_HEADER, reason) from error
            if not header.isreg():
                reason = f"{header.name} is not a file of the tar, but of type {header.type!r}"
                raise SampleError(Fault.TAR_HEADER, reason)
            if header.size != size or not header.name.endswith(suffix):
                reason = f"tar header says {header.name} with {header.size} bytes, the index {suffix} with {size}"
                raise SampleError(Fault.TAR_HEADER, reason)

    def read_labels(self, location: ClipLocation) -> dict:
        """Read and check a clip's JSON. Raises SampleError."""
        if location.json_size > MAX_LABEL_BYTES:
            raise SampleError(Fault.JSON, f"JSON has {location.json_size} bytes, more than {MAX_LABEL_BYTES}")
        try:
            content = self._files.read(location, location.json_offset, location.json_size)
        except OSError as error:
            raise SampleError(Fault.FILE, f"cannot read {location.shard}: {error.strerror}") from error
        try:
            labels = parse_json(content, "the labels")
        except UserError as error:
            raise SampleError(Fault.JSON, f"damaged JSON ({error})") from error
        if not isinstance(labels, dict) or not isinstance(labels.get("id"), str):
            raise SampleError(Fault.JSON, "JSON without an id")
        found = (labels.get("sampling_rate"), labels.get("num_samples"), "text" in labels)
        wanted = (self._sampling_rate, location.num_samples, location.has_text)
        if found != wanted:
            raise SampleError(Fault.INDEX, f"JSON says rate, length and text {found}, the index says {wanted}")
        if location.has_text and (not isinstance(labels["text"], str) or labels.get("task") not in TASKS):
            raise SampleError(Fault.TEXT, f"text without a known task: {labels.get('task')!r}")
        if location.json_crc32 not in (None, zlib.crc32(content)):
            raise SampleError(Fault.JSON, "JSON was altered: its checksum differs from the index")
        return labels

    def read_audio(self, location: ClipLocation, start: int, num_samples: int) -> Tensor:
        """Read a part of a clip as float32 [C, T]. Raises SampleError."""
        try:
            to_end = start + num_samples == location.num_samples  # also reveals a file that is longer than indexed
            file = self._files.open_audio(location)
            audio, rate = read_audio(file, start=start, num_samples=None if to_end else num_samples, is_whole=True)
        except OSError as error:
            raise SampleError(Fault.FILE, f"cannot read {location.shard}: {error.strerror}") from error
        found, wanted = (rate, *audio.shape), (self._sampling_rate, self._num_channels, num_samples)
        if found != wanted:
            raise SampleError(Fault.INDEX, f"rate, channels and length are {found}, the index says {wanted}")
        return audio


class SampleReader:
    """Turns references into clips that are ready for training."""

    def __init__(
        self, clip_format: ClipFormat, text_encoder: TextEncoder | None, max_text_tokens: int | None = None
    ) -> None:
        self._max_text_tokens = max_text_tokens
        self._clips = ClipReader(clip_format.stored_rate, clip_format.num_channels)
        self._format = clip_format
        self._text_encoder = text_encoder

    def read(self, ref: SampleRef) -> TrainingClip:
        """Read one sample. Raises SampleError with the id of the clip."""
        sample_id = f"{Path(ref.location.shard).name}@{ref.location.audio_offset}"
        try:
            self._clips.check_headers(ref.location)
            labels = self._clips.read_labels(ref.location)
            sample_id = labels["id"]
            audio = self._clips.read_audio(ref.location, ref.start, ref.num_samples)
            tokens: tuple[int, ...] = ()
            if ref.with_text and self._text_encoder is not None:
                try:
                    tokens = tuple(self._text_encoder(labels["text"]))
                except Exception as error:  # whatever a tokenizer raises for odd text must not stop the run
                    reason = f"the text encoder raised {type(error).__name__}: {error}"
                    raise SampleError(Fault.TEXT, reason) from error
                if not tokens:
                    raise SampleError(Fault.TEXT, "the text encoder gives no tokens")
        except SampleError as error:
            raise SampleError(error.fault, error.reason, sample_id) from error
        is_too_long = self._max_text_tokens is not None and len(tokens) > self._max_text_tokens
        tokens = () if is_too_long else tokens
        task_id = TASKS.index(labels["task"]) if tokens else -1
        audio, target = adjust_level(audio, self._format, ref.gain_uniform), None
        if self._format.output_ratio > 1:  # the same bits as `encode` computes from a file with this clip
            audio, target = resample(audio, self._format.stored_rate, self._format.sampling_rate), audio
        return TrainingClip(ref, sample_id, audio, tokens, task_id, is_too_long, target)


MIN_SAMPLES = 1000
"""The invalid fraction is computed over at least this many samples, so that a first invalid one does not end a run."""

RECENT_UPDATES = 20
RECENT_INVALID_FRACTION = 0.5
"""Maximum invalid fraction over the last RECENT_UPDATES updates, or `max_invalid_fraction` if that is larger. Late in a
run, a limit on the fraction of all samples alone would let it continue without data for days."""


class StreamCounter:
    """Counts the samples that a run has used and lost; at most `max_invalid_fraction` of them may be lost."""

    def __init__(self, sampling_rate: int, *, max_invalid_fraction: float = 0.01) -> None:
        self._sampling_rate = sampling_rate
        self._max_invalid_fraction = max_invalid_fraction
        self._samples: Counter[str] = Counter()  # audio samples by domain
        self._kinds: Counter[str] = Counter()
        self._num_clips = 0
        self.num_without_text = 0  # samples so far whose text was too long
        self._named: set[str] = set()
        self._last_line = ""
        self._recent: deque[tuple[int, int]] = deque(maxlen=RECENT_UPDATES)  # used and invalid samples of an update

    @property
    def hours(self) -> dict[str, float]:
        """Hours of audio used so far, by domain."""
        return {domain: count / self._sampling_rate / 3600 for domain, count in sorted(self._samples.items())}

    @property
    def invalid(self) -> dict[str, int]:
        """Samples lost so far, by kind."""
        return dict(sorted(self._kinds.items()))

    def describe_dropped(self, batch: UpdateBatch) -> list[str]:
        """Return a line for every sample of this rank that is invalid or used without its text, unless named before."""
        lines = []
        for bad in batch.dropped:
            if bad.name not in self._named:
                self._named.add(bad.name)
                lines.append(f"skipped {bad.name}: {bad.reason}")
        self._last_line = lines[-1] if lines else ""
        for sample_id in batch.without_text:
            if sample_id not in self._named:
                self._named.add(sample_id)
                lines.append(f"used {sample_id} without its text, which has more than data.max_text_tokens")
        return lines

    def counts(self, batch: UpdateBatch, domains: Iterable[str]) -> dict[str, float]:
        """Return the counts of one update by name. Names depend only on `domains`: counts can be summed over ranks."""
        counts = {f"samples/{domain}": 0.0 for domain in sorted(domains)}
        counts |= {f"bad/{fault}": 0.0 for fault in Fault} | {"used_clips": 0.0}
        counts["without_text"] = float(len(batch.without_text))
        for micro_batch in batch.micro_batches:
            counts["used_clips"] += micro_batch.num_clips
            lengths = (micro_batch.host or micro_batch).audio_lengths.tolist()  # host: no wait for the device
            for domain, length in zip(micro_batch.domains, lengths, strict=True):
                counts[f"samples/{domain}"] += length
        for bad in batch.dropped:
            counts[f"bad/{bad.fault}"] += 1
        return counts

    def add_counts(self, counts: Mapping[str, float]) -> None:
        """Add the counts of one update, summed over ranks; names other than those of `counts` are ignored.

        Raises UserError when too large a share of all samples, or of the recent ones, was lost.
        """
        used = int(counts["used_clips"])
        self._num_clips += used
        self.num_without_text += int(counts.get("without_text", 0))
        self._recent.append((used, int(sum(value for name, value in counts.items() if name.startswith("bad/")))))
        for name, value in counts.items():
            group, _, key = name.partition("/")
            if value and group in ("samples", "bad"):
                (self._samples if group == "samples" else self._kinds)[key] += int(value)
        used, lost = (sum(column) for column in zip(*self._recent, strict=True))
        allowed = max(RECENT_INVALID_FRACTION, self._max_invalid_fraction) * (used + lost)
        if len(self._recent) == RECENT_UPDATES and lost > allowed:
            raise UserError(
                f"{lost} of the {used + lost} samples of the last {RECENT_UPDATES} updates could not be used: is the "
                f"data still in reach? The same command resumes from the newest checkpoint. {self._last_line}".rstrip()
            )
        num_invalid = sum(self._kinds.values())
        num_samples = self._num_clips + num_invalid
        if num_invalid > self._max_invalid_fraction * max(num_samples, MIN_SAMPLES):
            kinds = ", ".join(f"{count} {kind}" for kind, count in self._kinds.most_common())
            raise UserError(
                f"{num_invalid} of {num_samples} samples could not be used ({kinds}), more than max_invalid_fraction="
                f"{self._max_invalid_fraction} allows; find them with `moss_train inspect`. {self._last_line}".rstrip()
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as plain data, for a checkpoint."""
        return {
            "samples": dict(self._samples),
            "kinds": dict(self._kinds),
            "num_clips": self._num_clips,
            "num_without_text": self.num_without_text,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting from an earlier `state_dict`."""
        self._samples, self._kinds = Counter(state["samples"]), Counter(state["kinds"])
        self._num_clips = state["num_clips"]
        self.num_without_text = state.get("num_without_text", 0)  # missing in older checkpoints, which left no text out
