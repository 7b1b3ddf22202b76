"""Reconstruct clips for the metrics: references and reconstructions as 16-bit audio.

Reconstructions are made by a codec, or come from folders that any codec has written.
"""

import hashlib
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moss_train.audio.io import convert_channels, read_audio, resample, to_pcm16
from moss_train.batch import ListedClip
from moss_train.evaluation.codecs.base import Codec, bitrate
from moss_train.utils.errors import UserError, first_line

RESAMPLE_ONLY = "resample-only"
ANCHORS = (RESAMPLE_ONLY, "mismatched")
"""The ceiling: the original, resampled to the codec's output rate. The floor: another clip of the same domain, by
another speaker if known."""


@dataclass(frozen=True)
class Condition:
    """How a reconstruction was made: one row of the table."""

    system: str
    num_quantizers: int | None = None
    bitrate: float | None = None  # nominal, bit/s

    @property
    def label(self) -> str:
        """Short name for tables and file names."""
        return self.system if self.num_quantizers is None else f"{self.system} {self.num_quantizers}"


@dataclass(frozen=True)
class Reconstruction:
    """A reference and a reconstruction, [C, T] float32, of one condition."""

    condition: Condition
    reference: Tensor
    degraded: Tensor
    sampling_rate: int


@dataclass(frozen=True)
class ClipReconstructions:
    """Everything made of one clip."""

    reconstructions: tuple[Reconstruction, ...]
    seconds: float  # of audio
    codes: Tensor | None = None  # [N, frames]
    encode_seconds: float = 0.0  # of computing
    decode_seconds: dict[int, float] = field(default_factory=dict)  # by number of levels
    values: dict[Condition, dict[str, float]] = field(default_factory=dict)  # measured on the codes
    failures: dict[Condition, str] = field(default_factory=dict)  # conditions without reconstruction, with the reason


class CodecReconstructor:
    """Encodes a clip once and decodes every wanted prefix of its levels; adds the two anchors.

    measure: function of the codes [n, frames] and the labels of a clip; returns values measured on codes, not on audio.
    """

    def __init__(
        self,
        codec: Codec,
        num_quantizers: Sequence[int],
        clips: Sequence[ListedClip],
        with_anchors: bool = True,
        measure: Callable[[Tensor, Mapping[str, str]], dict[str, float]] | None = None,
    ) -> None:
        depths = [Condition(codec.name, count, bitrate(codec, count)) for count in num_quantizers]
        self.conditions = (*depths, *(map(Condition, ANCHORS) if with_anchors else ()))
        self._codec = codec
        self._others = mismatched_clips(clips) if with_anchors else {}
        self._measure = measure

    def depends_on(self, clip: ListedClip) -> str:
        """Return the id of the mismatched clip, which may be another one when the evaluation set changes."""
        return self._others[clip.id].id if clip.id in self._others else ""

    def lacking(self, found: Collection[Condition]) -> tuple[Condition, ...]:
        """Return the conditions that are missing in a row with those found."""
        return tuple(condition for condition in self.conditions if condition not in found)

    def reconstruct(
        self, clip: ListedClip, audio: Tensor, rate: int, wanted: Collection[Condition] | None = None
    ) -> ClipReconstructions:
        """Reconstruct a clip [C, T] at `rate` Hz. Raises UserError for audio that is empty or not finite.

        Args:
            wanted: conditions to reconstruct, all of them when None.
        """
        check_audio(audio, clip.id)
        codec, output_rate = self._codec, self._codec.output_sampling_rate
        original = self._prepare(audio, rate, codec.sampling_rate)
        reference = pcm16(original if codec.sampling_rate == output_rate else self._prepare(audio, rate, output_rate))
        seconds = audio.shape[-1] / rate
        wanted = self.conditions if wanted is None else wanted
        needs_anchors = any(condition.num_quantizers is None for condition in wanted)
        reconstructions, failures = self._anchors(clip, audio, rate, reference) if needs_anchors else ([], {})
        depths = [item for item in self.conditions if item.num_quantizers is not None and item in wanted]
        try:
            codes, encode_seconds = _timed(codec.encode, original)
            decoded = [_timed(codec.decode, codes[: condition.num_quantizers]) for condition in depths]
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            failures = dict.fromkeys(depths, f"{codec.name} failed: {first_line(error)}") | failures
            return ClipReconstructions(tuple(reconstructions), seconds, failures=failures)
        times, values = {}, {}
        for condition, (output, decode_seconds) in zip(depths, decoded, strict=True):
            degraded = pcm16(fit_length(output, reference.shape[-1]))
            reconstructions.append(Reconstruction(condition, reference, degraded, output_rate))
            times[condition.num_quantizers or 0] = decode_seconds
            if self._measure is not None:
                values[condition] = self._measure(codes[: condition.num_quantizers], clip.labels)
        return ClipReconstructions(tuple(reconstructions), seconds, codes, encode_seconds, times, values, failures)

    def _prepare(self, audio: Tensor, rate: int, wanted: int) -> Tensor:
        return resample(convert_channels(audio, self._codec.num_channels), rate, wanted)

    def _anchors(
        self, clip: ListedClip, audio: Tensor, rate: int, reference: Tensor
    ) -> tuple[list[Reconstruction], dict[Condition, str]]:
        ceiling, floor = map(Condition, ANCHORS)
        output_rate = self._codec.output_sampling_rate
        # If rates and numbers of channels agree, resampling there and back changes nothing, as it should.
        back = fit_length(resample(reference, output_rate, rate), audio.shape[-1])
        original = pcm16(convert_channels(audio, self._codec.num_channels))
        anchors = [Reconstruction(ceiling, original, back, rate)]
        if clip.id not in self._others:
            return anchors, {floor: "no other clip in the domain"}
        try:
            different = self._prepare(*self._others[clip.id].read(), output_rate)
        except (UserError, OSError) as error:
            return anchors, {floor: str(error)}
        return [*anchors, Reconstruction(floor, reference, pcm16(different), output_rate)], {}


def _timed(function: Callable[[Tensor], Tensor], argument: Tensor) -> tuple[Tensor, float]:
    started = time.perf_counter()
    return function(argument), time.perf_counter() - started


def mismatched_clips(clips: Sequence[ListedClip]) -> dict[str, ListedClip]:
    """Choose for every clip another one of its domain, by another speaker where there is one.

    The choice depends on the set of clips, not on its order; a clip alone in its domain has none.
    """
    ordered = sorted(clips, key=lambda clip: (hashlib.sha256(clip.id.encode()).digest(), clip.id))
    chosen: dict[str, ListedClip] = {}
    for domain in sorted({clip.domain for clip in clips}):
        members = [clip for clip in ordered if clip.domain == domain]
        for index, clip in enumerate(members):
            others = members[index + 1 :] + members[:index]
            speaker = clip.labels.get("speaker")
            others_speakers = (other for other in others if speaker is None or other.labels.get("speaker") != speaker)
            if others:
                chosen[clip.id] = next(others_speakers, others[0])
    return chosen


def check_audio(audio: Tensor, name: str) -> None:
    """Raise UserError for audio without samples or with NaN or infinite ones."""
    if audio.shape[-1] == 0:
        raise UserError(f"{name} has no samples")
    if not torch.isfinite(audio).all():
        raise UserError(f"{name} contains NaN or infinite samples")


def pcm16(audio: Tensor) -> Tensor:
    """Round and clip audio to 16 bits, as in a file; NaN stays NaN, so that a broken codec fails and is not silence."""
    return torch.where(audio.isnan(), audio, to_pcm16(audio.nan_to_num()).float() / 32768)


def fit_length(audio: Tensor, length: int) -> Tensor:
    """Cut [..., T] or append zeros to `length` samples."""
    return F.pad(audio[..., :length], (0, max(0, length - audio.shape[-1])))


LAYOUTS = (("gt_audios", "syn_audios"), ("reference", "reconstruction"), ("original", "reconstructed"))
"""Names of the two folders; the first are those of the evaluation code released with MOSS-Audio-Tokenizer."""


@dataclass(frozen=True)
class PairFolder:
    """Two folders side by side, with the condition and the domain found in their path."""

    reference: Path
    degraded: Path
    condition: Condition
    domain: str


def find_pairs(root: Path, domain: str, bits_per_level: float | None) -> list[PairFolder]:
    """Return all folders of pairs at or below `root`.

    In MODEL/rvqN/DATASET/{gt_audios,syn_audios} the path names system, levels and dataset, which becomes the domain;
    elsewhere the system is the folder's name. Raises UserError when there are none.
    """
    if not root.is_dir():
        raise UserError(f"pairs={root} is not a folder")
    found: list[PairFolder] = []
    for reference_name, degraded_name in LAYOUTS:
        for reference in sorted(path for path in root.rglob(reference_name) if path.is_dir()):
            degraded = reference.with_name(degraded_name)
            if degraded.is_dir():
                folder = reference.parent
                if depth := re.fullmatch(r"rvq(\d+)", folder.parent.name):
                    levels = int(depth[1])
                    bits = None if bits_per_level is None else bits_per_level * levels
                    condition = Condition(folder.parent.parent.resolve().name, levels, bits)
                    found.append(PairFolder(reference, degraded, condition, folder.name))
                else:
                    found.append(PairFolder(reference, degraded, Condition(folder.resolve().name), domain))
    if not found:
        names = " or ".join(f"{first}/ and {second}/" for first, second in LAYOUTS)
        raise UserError(f"pairs={root} has no folders {names}")
    return found


class PairReconstructor:
    """Reads the reconstructions of a clip from every folder of its domain; nothing is aligned or adjusted."""

    def __init__(self, folders: list[PairFolder], domain: str) -> None:
        self._folders = folders
        self._domain = domain  # speech, music, ...; the clips are grouped by data set
        unique = dict.fromkeys(folder.condition for folder in folders)
        self.conditions = tuple(sorted(unique, key=lambda item: (item.system, item.num_quantizers or 0)))

    def clips(self) -> list[ListedClip]:
        """Return the references of all folders; a file of the same name in several folders of a domain is one clip."""
        clips: dict[tuple[str, str], ListedClip] = {}
        for folder in self._folders:
            for path in sorted(
                path for path in folder.reference.rglob("*") if path.suffix.lower() in (".wav", ".flac")
            ):
                name = path.relative_to(folder.reference).with_suffix("").as_posix()
                labels = {"domain": self._domain}
                clip = ListedClip(f"{folder.domain}/{name}", folder.domain, partial(read_audio, path), labels)
                clips.setdefault((folder.domain, name), clip)
        if not clips:
            raise UserError(f"{self._folders[0].reference} has no audio files")
        return [clips[key] for key in sorted(clips)]

    def depends_on(self, clip: ListedClip) -> str:
        """Hash the bytes of the reconstructions."""
        digest = hashlib.sha256()
        for folder in self._folders:
            if folder.domain == clip.domain:
                with suppress(UserError):
                    digest.update(str(folder.condition).encode() + _find(folder.degraded, clip).read_bytes())
        return digest.hexdigest()

    def lacking(self, found: Collection[Condition]) -> tuple[Condition, ...]:
        """Return nothing: a changed reconstruction gives the clip a new row (see `depends_on`)."""
        return ()

    def reconstruct(
        self, clip: ListedClip, audio: Tensor, rate: int, wanted: Collection[Condition] = ()
    ) -> ClipReconstructions:
        """Pair a reference [C, T] with all its reconstructions; missing or unreadable ones are failures."""
        check_audio(audio, clip.id)
        reconstructions: list[Reconstruction] = []
        failures: dict[Condition, str] = {}
        for folder in (folder for folder in self._folders if folder.domain == clip.domain):
            try:
                reference, wanted_rate = read_audio(_find(folder.reference, clip))
                degraded = resample(*read_audio(_find(folder.degraded, clip)), wanted_rate)
                reconstructions.append(Reconstruction(folder.condition, reference, degraded, wanted_rate))
            except UserError as error:
                failures[folder.condition] = str(error)
        return ClipReconstructions(tuple(reconstructions), audio.shape[-1] / rate, failures=failures)


def _find(folder: Path, clip: ListedClip) -> Path:
    """The file of a clip in a folder. Raises UserError when there is none."""
    name = clip.id.removeprefix(f"{clip.domain}/")
    for suffix in (".flac", ".wav", ".FLAC", ".WAV"):
        if (path := folder / f"{name}{suffix}").is_file():
            return path
    raise UserError(f"{folder} has no {name}.flac or {name}.wav")


Reconstructor = CodecReconstructor | PairReconstructor
"""The two sources of the pairs of a clip."""
