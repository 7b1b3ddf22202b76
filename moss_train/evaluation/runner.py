"""Run an evaluation clip by clip; a second run continues where the first one stopped."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from moss_train.batch import ListedClip
from moss_train.evaluation.metrics.base import Metric, Pair, score_pair
from moss_train.evaluation.reconstruct import Condition, Reconstruction, Reconstructor
from moss_train.evaluation.results import AUDIO_FOLDER, ClipRow, ConditionRow, Results, clip_key
from moss_train.utils.errors import UserError
from moss_train.utils.progress import progress
from moss_train.utils.workers import worker_pool

# Input of a worker: the row without its scores, the labels, reference and reconstruction with their rate for each
# condition, and the values that are known already. Audio as arrays, because tensors would go through shared memory.
_Task = tuple[
    ClipRow,
    Mapping[str, str],
    Sequence[tuple[Condition, np.ndarray, np.ndarray, int]],
    Mapping[Condition, Mapping[str, float]],
]


def evaluate(
    clips: Sequence[ListedClip],
    reconstructor: Reconstructor,
    metrics: Mapping[str, Metric],
    results: Results,
    *,
    num_workers: int = 0,
    keep_audio_of: frozenset[str] = frozenset(),
) -> list[ClipRow]:
    """Score every clip under every condition; returns the rows in the order of the clips.

    Values already in the results are not computed again: a row only gets the conditions that it lacks. Neither
    `num_workers` nor an interruption changes a value. Clips that cannot be read or reconstructed get a row with the
    failure.

    Args:
        keep_audio_of: ids of the clips whose audio is kept.
    """
    keys: list[str] = []

    def reconstructed() -> Iterator[_Task]:
        """Yield reconstructions of the conditions that the results lack, clip by clip."""
        for clip in clips:
            made = None
            try:
                audio, rate = clip.read()
                key = clip_key(clip, audio, rate, reconstructor.depends_on(clip))
                wants_audio = clip.id in keep_audio_of and not (results.folder / AUDIO_FOLDER / key).is_dir()
                wanted, found = reconstructor.conditions, results.rows.get(key)
                if found is not None and found.failure is None and not wants_audio:
                    wanted = reconstructor.lacking([entry.condition for entry in found.conditions])
                if wanted:
                    made = reconstructor.reconstruct(clip, audio, rate, wanted)
            except (UserError, OSError) as error:
                key = clip_key(clip)
                results.add(ClipRow(clip.id, clip.domain, key, 0.0, (), str(error)))
            keys.append(key)
            bar.advance()
            if made is None:
                continue
            results.times.add(made)
            if made.codes is not None:
                results.keep_codes(key, made.codes)
            if clip.id in keep_audio_of:
                results.keep_audio(key, made.reconstructions)
            failed = tuple(ConditionRow(condition, failure=reason) for condition, reason in made.failures.items())
            row = ClipRow(clip.id, clip.domain, key, made.seconds, failed)
            pairs = [
                (item.condition, item.reference.numpy(), item.degraded.numpy(), item.sampling_rate)
                for item in made.reconstructions
            ]
            yield row, {"domain": clip.domain} | clip.labels, pairs, made.values

    with (
        progress("evaluating", total=len(clips)) as bar,
        worker_pool(num_workers, __name__, partial(_use_metrics, metrics), num_threads=None) as map_ordered,
    ):
        for _, row in map_ordered(_score, reconstructed()):
            results.add(row)
    rows = [results.rows[key] for key in keys]
    results.finish(rows)
    return rows


def score_reconstructions(
    reconstructions: Sequence[Reconstruction],
    metrics: Mapping[str, Metric],
    labels: Mapping[str, str],
    values: Mapping[Condition, Mapping[str, float]] | None = None,
) -> tuple[ConditionRow, ...]:
    """Score the reconstructions of one clip.

    Args:
        reconstructions: of the clip, one for each condition.
        metrics: by name.
        labels: of the clip: its domain, text and language.
        values: already known values, by condition.
    """
    rows = []
    for item in reconstructions:
        scores = score_pair(metrics, Pair(item.reference, item.degraded, item.sampling_rate, labels))
        known = (values or {}).get(item.condition, {})
        rows.append(ConditionRow(item.condition, {**known, **scores.values}, scores.errors, scores.official))
    return tuple(rows)


_worker_metrics: Mapping[str, Metric] = {}


def _use_metrics(metrics: Mapping[str, Metric], worker: int) -> None:
    global _worker_metrics
    _worker_metrics = metrics


def _score(task: _Task) -> ClipRow:
    row, labels, pairs, values = task
    reconstructions = [
        Reconstruction(condition, torch.from_numpy(reference), torch.from_numpy(degraded), rate)
        for condition, reference, degraded, rate in pairs
    ]
    scored = score_reconstructions(reconstructions, _worker_metrics, labels, values)
    return replace(row, conditions=(*row.conditions, *scored))
