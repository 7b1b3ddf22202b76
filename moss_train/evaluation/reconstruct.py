"""Reconstruct clips for the metrics: references and reconstructions as 16-bit audio."""

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moss_train.audio.io import convert_channels, resample, to_pcm16
from moss_train.evaluation.codecs.base import Codec, bitrate
from moss_train.utils.errors import UserError

RESAMPLE_ONLY = "resample-only"
MISMATCHED = "mismatched"
ANCHORS = (RESAMPLE_ONLY, MISMATCHED)
"""The ceiling: the original at the codec's rate. The floor: another clip of the domain, by another speaker if known."""


@dataclass(frozen=True)
class EvaluationClip:
    """One clip of the evaluation set; its audio is read when it is needed."""

    id: str
    domain: str
    read: Callable[[], tuple[Tensor, int]]  # audio [C, T] and its rate in Hz; raises UserError
    labels: dict[str, str] = field(default_factory=dict)  # text, language, speaker; domain where it is another name


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
class Rendition:
    """A reference and a reconstruction, [C, T] float32, of one condition."""

    condition: Condition
    reference: Tensor
    degraded: Tensor
    sampling_rate: int


@dataclass(frozen=True)
class ClipReconstructions:
    """Everything made of one clip."""

    renditions: tuple[Rendition, ...]
    seconds: float  # of audio
    codes: Tensor | None = None  # [N, frames]
    encode_seconds: float = 0.0  # of computing
    decode_seconds: dict[int, float] = field(default_factory=dict)  # by number of levels
    values: dict[Condition, dict[str, float]] = field(default_factory=dict)  # measured on the codes
    failures: dict[Condition, str] = field(default_factory=dict)  # conditions without reconstruction, with the reason


class CodecRenderer:
    """Encodes a clip once and decodes every wanted prefix of its levels; adds the two anchors.

    measure: what is computed from the codes [n, frames] and the labels of a clip instead of from audio.
    """

    def __init__(
        self,
        codec: Codec,
        num_quantizers: Sequence[int],
        clips: Sequence[EvaluationClip],
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

    def depends_on(self, clip: EvaluationClip) -> str:
        """The clip that stands for a mismatch, which is another one when the evaluation set changes."""
        return self._others[clip.id].id if clip.id in self._others else ""

    def lacking(self, found: Collection[Condition]) -> tuple[Condition, ...]:
        """Conditions that are not among those found."""
        return tuple(condition for condition in self.conditions if condition not in found)

    def render(
        self, clip: EvaluationClip, audio: Tensor, rate: int, wanted: Collection[Condition] | None = None
    ) -> ClipReconstructions:
        """Render a clip [C, T] at `rate` Hz. Raises UserError for audio that is empty or not finite.

        Args:
            wanted: conditions to render, all of them when None.
        """
        check_audio(audio, clip.id)
        original = self._prepare(audio, rate)
        reference = pcm16(original)
        seconds = audio.shape[-1] / rate
        wanted = self.conditions if wanted is None else wanted
        needs_anchors = any(condition.num_quantizers is None for condition in wanted)
        renditions, failures = self._anchors(clip, audio, rate, reference) if needs_anchors else ([], {})
        depths = [condition for condition in self.conditions[: len(self._levels)] if condition in wanted]
        try:
            codes, encode_seconds = _timed(self.codec.encode, original)
            decoded = [_timed(self.codec.decode, codes[: condition.num_quantizers]) for condition in depths]
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            reason = f"{self.codec.name} failed: {str(error).splitlines()[0]}"
            return ClipReconstructions(tuple(renditions), seconds, failures=dict.fromkeys(depths, reason) | failures)
        for condition, (output, _) in zip(depths, decoded, strict=True):
            degraded = pcm16(fit_length(output, reference.shape[-1]))
            renditions.append(Rendition(condition, reference, degraded, self.codec.sampling_rate))
        times = dict(
            zip((condition.num_quantizers or 0 for condition in depths), (spent for _, spent in decoded), strict=True)
        )
        values = (
            {item: self._measure(codes[: item.num_quantizers], clip.labels) for item in depths} if self._measure else {}
        )
        return ClipReconstructions(tuple(renditions), seconds, codes, encode_seconds, times, values, failures)

    def _prepare(self, audio: Tensor, rate: int) -> Tensor:
        return resample(convert_channels(audio, self.codec.num_channels), rate, self.codec.sampling_rate)

    def _anchors(
        self, clip: EvaluationClip, audio: Tensor, rate: int, reference: Tensor
    ) -> tuple[list[Rendition], dict[Condition, str]]:
        if not self._with_anchors:
            return [], {}
        ceiling, floor = map(Condition, ANCHORS)
        # At one rate and with one number of channels the way there and back changes nothing, as it should.
        back = fit_length(resample(reference, self.codec.sampling_rate, rate), audio.shape[-1])
        original = pcm16(convert_channels(audio, self.codec.num_channels))
        anchors = [Rendition(ceiling, original, back, rate)]
        if clip.id not in self._others:
            return anchors, {floor: "no other clip in the domain"}
        try:
            different = self._prepare(*self._others[clip.id].read())
        except (UserError, OSError) as error:
            return anchors, {floor: str(error)}
        return [*anchors, Rendition(floor, reference, pcm16(different), self.codec.sampling_rate)], {}


def _timed(function: Callable[[Tensor], Tensor], argument: Tensor) -> tuple[Tensor, float]:
    started = time.perf_counter()
    return function(argument), time.perf_counter() - started


def mismatched_clips(clips: Sequence[EvaluationClip]) -> dict[str, EvaluationClip]:
    """For every clip another one of its domain, by another speaker where there is one.

    The choice depends on the set of clips, not on its order; a clip alone in its domain has none.
    """
    ordered = sorted(clips, key=lambda clip: (hashlib.sha256(clip.id.encode()).digest(), clip.id))
    chosen: dict[str, EvaluationClip] = {}
    for domain in sorted({clip.domain for clip in clips}):
        members = [clip for clip in ordered if clip.domain == domain]
        for index, clip in enumerate(members):
            others = members[index + 1 :] + members[:index]
            speaker = clip.labels.get("speaker")
            strangers = (other for other in others if speaker is None or other.labels.get("speaker") != speaker)
            if others:
                chosen[clip.id] = next(strangers, others[0])
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
