"""Held-out clips in memory, in the format of the training clips: the same ones in every validation of a run."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from moss_train.audio.io import convert_channels, resample
from moss_train.data.clips import ListedClip, list_sources
from moss_train.data.stream.sample_reader import adjust_level
from moss_train.data.stream.stream import ClipFormat
from moss_train.utils.errors import UserError

MIDDLE = 0.5  # of the range of the random gain in training


@dataclass(frozen=True)
class HeldOutClip:
    """One clip of the validation."""

    id: str
    domain: str
    audio: Tensor  # [C, T] at the model's rate, T a whole number of hops
    length: int  # samples before padding
    text: str | None
    task: str


def load_held_out(
    sources: Sequence[str], clip_format: ClipFormat, *, max_clips: int, max_seconds: float
) -> list[HeldOutClip]:
    """Read at most `max_clips` clips of packed folders, folders or manifests, domains and clips with text in turn.

    The choice depends on the ids alone. A clip beyond `max_seconds` is cut to them and loses its text, as in training.

    Raises:
        UserError: there is none, or one cannot be read; before the training, not in the middle of it.
    """
    try:
        chosen = interleave_by_domain(list_sources(sources, "heldout", "validation.data"))[:max_clips]
        clips = [read_clip(clip, clip_format, max_seconds) for clip in chosen]
    except UserError as error:
        raise UserError(f"validation.data: {error}") from error
    if not clips:
        raise UserError(f"validation.data={list(sources)} has no clips")
    return clips


def interleave_by_domain(clips: Sequence[ListedClip]) -> list[ListedClip]:
    """All clips, one of each domain with and without text after the other, in a random order that never changes."""
    groups: dict[tuple[str, bool], list[ListedClip]] = {}
    for clip in sorted(clips, key=lambda clip: hashlib.sha256(clip.id.encode()).digest()):
        groups.setdefault((clip.domain, "text" not in clip.labels), []).append(clip)
    ordered = [groups[key] for key in sorted(groups)]
    return [clip for turn in _turns(ordered) for clip in turn]


def _turns(groups: Sequence[Sequence[ListedClip]]) -> Iterator[list[ListedClip]]:
    for place in range(max(map(len, groups), default=0)):
        yield [group[place] for group in groups if place < len(group)]


def read_clip(clip: ListedClip, clip_format: ClipFormat, max_seconds: float) -> HeldOutClip:
    """Read one clip in the format of training, level included."""
    audio, rate = clip.read()
    if audio.shape[-1] == 0:
        raise UserError(f"{clip.id} has no samples")
    limit = round(max_seconds * rate)
    text = clip.labels.get("text") if audio.shape[-1] <= limit else None
    audio = convert_channels(audio[:, :limit], clip_format.num_channels, clip.id)
    audio = adjust_level(resample(audio, rate, clip_format.sampling_rate), clip_format, MIDDLE)
    length = audio.shape[-1]
    padded = F.pad(audio, (0, -length % clip_format.hop_length))
    return HeldOutClip(clip.id, clip.domain, padded, length, text, clip.labels.get("task", "asr"))
