"""Reconstruct clips for the metrics: references and reconstructions as 16-bit audio.

Reconstructions are made by a codec, or come from folders that any codec has written.
"""

import hashlib
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moss_train.audio.io import convert_channels, read_audio, resample, to_pcm16
from moss_train.batch import ListedClip
from moss_train.evaluation.codecs.base import Codec, bitrate
from moss_train.utils.errors import UserError, first_line

RESAMPLE_ONLY = "resample-only"
MISMATCHED = "mismatched"
ANCHORS = (RESAMPLE_ONLY, MISMATCHED)
"""The ceiling: the original at the rate of the codec's output. The floor: another clip of the domain, by another
speaker if known."""


@dataclass(frozen=True)
class Condition:
    """What a reconstruction went through: one row of the table."""

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

    measure: what is computed from the codes [n, frames] and the labels of a clip instead of from audio.
    """

    def __init__(
        self,
        codec: Codec,
        num_quantizers: Sequence[int],
        clips: Sequence[ListedClip],
        with_anchors: bool = True,
        measure: Callable[[Tensor, Mapping[str, str]], dict[str, float]] | None = None,
    ) -> None:
        self.codec = codec
        self._levels = tuple(num_quantizers)
        self._others = mismatched_clips(clips) if with_anchors else {}
        self._with_anchors = with_anchors
        self._measure = measure

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """All conditions in the order of the table."""
        codec = self.codec
        depths = tuple(Condition(codec.name, count, bitrate(codec, count)) for count in self._levels)
        return depths + (tuple(map(Condition, ANCHORS)) if self._with_anchors else ())

    def depends_on(self, clip: ListedClip) -> str:
        """The clip that stands for a mismatch, which is another one when the evaluation set changes."""
        return self._others[clip.id].id if clip.id in self._others else ""

    def lacking(self, found: Collection[Condition]) -> tuple[Condition, ...]:
        """Conditions that are not among those found."""
        return tuple(condition for condition in self.conditions if condition not in found)

    def reconstruct(
        self, clip: ListedClip, audio: Tensor, rate: int, wanted: Collection[Condition] | None = None
    ) -> ClipReconstructions:
        """Render a clip [C, T] at `rate` Hz. Raises UserError for audio that is empty or not finite.

        Args:
            wanted: conditions to reconstruct, all of them when None.
        """
        check_audio(audio, clip.id)
        rates = (self.codec.sampling_rate, self.codec.output_sampling_rate)
        original = self._prepare(audio, rate, rates[0])
        reference = pcm16(original if rates[0] == rates[1] else self._prepare(audio, rate, rates[1]))
        seconds = audio.shape[-1] / rate
        wanted = self.conditions if wanted is None else wanted
        needs_anchors = any(condition.num_quantizers is None for condition in wanted)
        reconstructions, failures = self._anchors(clip, audio, rate, reference) if needs_anchors else ([], {})
        depths = [condition for condition in self.conditions[: len(self._levels)] if condition in wanted]
        try:
            codes, encode_seconds = _timed(self.codec.encode, original)
            decoded = [_timed(self.codec.decode, codes[: condition.num_quantizers]) for condition in depths]
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            reason = f"{self.codec.name} failed: {first_line(error)}"
            return ClipReconstructions(
                tuple(reconstructions), seconds, failures=dict.fromkeys(depths, reason) | failures
            )
        for condition, (output, _) in zip(depths, decoded, strict=True):
            degraded = pcm16(fit_length(output, reference.shape[-1]))
            reconstructions.append(Reconstruction(condition, reference, degraded, self.codec.output_sampling_rate))
        times = dict(
            zip((condition.num_quantizers or 0 for condition in depths), (spent for _, spent in decoded), strict=True)
        )
        values = (
            {item: self._measure(codes[: item.num_quantizers], clip.labels) for item in depths} if self._measure else {}
        )
        return ClipReconstructions(tuple(reconstructions), seconds, codes, encode_seconds, times, values, failures)

    def _prepare(self, audio: Tensor, rate: int, wanted: int) -> Tensor:
        return resample(convert_channels(audio, self.codec.num_channels), rate, wanted)

    def _anchors(
        self, clip: ListedClip, audio: Tensor, rate: int, reference: Tensor
    ) -> tuple[list[Reconstruction], dict[Condition, str]]:
        if not self._with_anchors:
            return [], {}
        ceiling, floor = map(Condition, ANCHORS)
        # At one rate and with one number of channels the way there and back changes nothing, as it should.
        back = fit_length(resample(reference, self.codec.output_sampling_rate, rate), audio.shape[-1])
        original = pcm16(convert_channels(audio, self.codec.num_channels))
        anchors = [Reconstruction(ceiling, original, back, rate)]
        if clip.id not in self._others:
            return anchors, {floor: "no other clip in the domain"}
        try:
            different = self._prepare(*self._others[clip.id].read(), self.codec.output_sampling_rate)
        except (UserError, OSError) as error:
            return anchors, {floor: str(error)}
        return [*anchors, Reconstruction(floor, reference, pcm16(different), self.codec.output_sampling_rate)], {}


def _timed(function: Callable[[Tensor], Tensor], argument: Tensor) -> tuple[Tensor, float]:
    started = time.perf_counter()
    return function(argument), time.perf_counter() - started


def mismatched_clips(clips: Sequence[ListedClip]) -> dict[str, ListedClip]:
    """For every clip another one of its domain, by another speaker where there is one.

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
    """Audio as a 16-bit file gives it back; NaN stays NaN, so that a broken codec is a failure and not silence."""
    return torch.where(audio.isnan(), audio, to_pcm16(audio.nan_to_num()).float() / 32768)


def fit_length(audio: Tensor, length: int) -> Tensor:
    """Cut [..., T] or append zeros to `length` samples."""
    return F.pad(audio[..., :length], (0, max(0, length - audio.shape[-1])))


LAYOUTS = (("gt_audios", "syn_audios"), ("reference", "reconstruction"), ("original", "reconstructed"))
"""Names of the two folders; the first are those of the evaluation code released with MOSS-Audio-Tokenizer."""

_DEPTH = re.compile(r"rvq(\d+)")


@dataclass(frozen=True)
class PairFolder:
    """Two folders side by side, with the condition and the domain that their path tells."""

    reference: Path
    degraded: Path
    condition: Condition
    domain: str


def find_pairs(root: Path, domain: str, bits_per_level: float | None) -> list[PairFolder]:
    """All folders of pairs at or below `root`.

    In MODEL/rvqN/DATASET/{gt_audios,syn_audios} the path names system, levels and dataset, which becomes the domain;
    elsewhere the system is the folder's name. Raises UserError when there are none.
    """
    if not root.is_dir():
        raise UserError(f"pairs={root} is not a folder")
    found: list[PairFolder] = []
    for reference_name, degraded_name in LAYOUTS:
        for reference in sorted(path for path in (root / reference_name, *root.rglob(reference_name)) if path.is_dir()):
            degraded = reference.with_name(degraded_name)
            if degraded.is_dir() and all(folder.reference != reference for folder in found):
                found.append(PairFolder(reference, degraded, *_named(reference.parent, domain, bits_per_level)))
    if not found:
        names = " or ".join(f"{first}/ and {second}/" for first, second in LAYOUTS)
        raise UserError(f"pairs={root} has no folders {names}")
    return found


def _named(folder: Path, domain: str, bits_per_level: float | None) -> tuple[Condition, str]:
    depth = _DEPTH.fullmatch(folder.parent.name)
    if depth is None:
        return Condition(folder.resolve().name), domain
    levels = int(depth[1])
    bits = None if bits_per_level is None else bits_per_level * levels
    return Condition(folder.parent.parent.resolve().name, levels, bits), folder.name


class PairReconstructor:
    """Reads the reconstructions of a clip from every folder that has its domain; nothing is aligned or adjusted."""

    def __init__(self, folders: list[PairFolder], domain: str) -> None:
        self._folders = folders
        self._domain = domain  # speech, music, ...; the clips are grouped by data set

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """All conditions, by system and bitrate."""
        unique = dict.fromkeys(folder.condition for folder in self._folders)
        return tuple(sorted(unique, key=lambda item: (item.system, item.num_quantizers or 0)))

    def clips(self) -> list[ListedClip]:
        """The references of all folders; a file of the same name in several folders of a domain is one clip."""
        clips: dict[tuple[str, str], ListedClip] = {}
        for folder in self._folders:
            for path in audio_files(folder.reference):
                name = path.relative_to(folder.reference).with_suffix("").as_posix()
                read = _Reader(path)
                clip = ListedClip(f"{folder.domain}/{name}", folder.domain, read, {"domain": self._domain})
                clips.setdefault((folder.domain, name), clip)
        if not clips:
            raise UserError(f"{self._folders[0].reference} has no audio files")
        return [clips[key] for key in sorted(clips)]

    def depends_on(self, clip: ListedClip) -> str:
        """The bytes of the reconstructions."""
        digest = hashlib.sha256()
        for folder in self._folders:
            name = clip.id.removeprefix(f"{clip.domain}/")
            if folder.domain == clip.domain and (path := _path(folder.degraded, name)) is not None:
                digest.update(str(folder.condition).encode() + path.read_bytes())
        return digest.hexdigest()

    def lacking(self, found: Collection[Condition]) -> tuple[Condition, ...]:
        """None: another file beside a reference makes another row (see `depends_on`)."""
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
                reconstructions.append(_read_pair(folder, clip.id.removeprefix(f"{clip.domain}/")))
            except UserError as error:
                failures[folder.condition] = str(error)
        return ClipReconstructions(tuple(reconstructions), audio.shape[-1] / rate, failures=failures)


def _read_pair(folder: PairFolder, name: str) -> Reconstruction:
    wanted, wanted_rate = read_audio(_find(folder.reference, name))
    got, got_rate = read_audio(_find(folder.degraded, name))
    return Reconstruction(folder.condition, wanted, resample(got, got_rate, wanted_rate), wanted_rate)


@dataclass(frozen=True)
class _Reader:
    path: Path

    def __call__(self) -> tuple[Tensor, int]:
        return read_audio(self.path)


def audio_files(folder: Path) -> list[Path]:
    """WAV and FLAC files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".wav", ".flac"))


def _find(folder: Path, name: str) -> Path:
    path = _path(folder, name)
    if path is None:
        raise UserError(f"{folder} has no {name}.flac or {name}.wav")
    return path


def _path(folder: Path, name: str) -> Path | None:
    return next((path for suffix in (".flac", ".wav") if (path := folder / f"{name}{suffix}").is_file()), None)
