"""Evaluation clips from folders, manifests and shards."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from moss_train.data.listing import FileClip, ShardClip, list_sources
from moss_train.evaluation.rendering import EvaluationClip
from moss_train.utils.errors import UserError


def find_clips(sources: Sequence[str], domain: str) -> list[EvaluationClip]:
    """All clips of all sources in their order. Raises UserError for what cannot be listed and for an id given twice."""
    return [EvaluationClip(clip.id, clip.domain, clip.read, clip.labels) for clip in list_sources(sources, domain)]


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
