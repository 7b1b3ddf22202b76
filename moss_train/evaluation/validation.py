"""The measures of the table on a few clips in memory, for a look during training."""

from collections.abc import Mapping, Sequence

from moss_train.evaluation.codecs.base import Codec
from moss_train.evaluation.metrics.asr import choose_backend
from moss_train.evaluation.metrics.base import Metric, Pair, columns_of, score_pair
from moss_train.evaluation.metrics.dnsmos import Dnsmos
from moss_train.evaluation.metrics.pitch import pitch_metrics
from moss_train.evaluation.metrics.signal import PROFILES, native_metrics
from moss_train.evaluation.metrics.speaker import Ge2eSimilarity
from moss_train.evaluation.reconstruct import CodecRenderer, Condition, EvaluationClip, Rendition
from moss_train.evaluation.results import ClipRow, ConditionRow
from moss_train.evaluation.statistics import ALL_DOMAINS, summarize
from moss_train.utils.errors import UserError


def validation_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Metrics by name with their defaults, in the order of the table. UserError for a name that does not exist."""
    known: dict[str, Metric] = {
        "speaker": Ge2eSimilarity(None),
        **native_metrics(PROFILES["official"]),
        **pitch_metrics(),
        "recognition": choose_backend("auto", None),
        "dnsmos": Dnsmos(),
    }
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"unknown metric {unknown[0]!r}, there are {', '.join(known)}")
    return {name: metric for name, metric in known.items() if name in names}


def validation_scores(
    codec: Codec, clips: Sequence[EvaluationClip], num_quantizers: Sequence[int], metrics: Mapping[str, Metric]
) -> dict[str, float]:
    """Means by `domain/measure/levels`, such as `speech/stoi/8`; nothing is written.

    The model is left in evaluation mode by its codec. UserError for a clip that cannot be read.
    """
    renderer = CodecRenderer(codec, num_quantizers, clips, with_anchors=False)
    rows = [_row(clip, renderer, metrics) for clip in clips]
    return mean_scores(rows, renderer.conditions, metrics)


def mean_scores(
    rows: Sequence[ClipRow], conditions: Sequence[Condition], metrics: Mapping[str, Metric]
) -> dict[str, float]:
    """Means over clips by `domain/measure/levels`, and those of all domains, which may be a single one."""
    table = summarize(rows, conditions, columns_of(metrics))
    is_one_domain = len({row.domain for row in table}) == 1
    return {
        f"{domain}/{key}/{row.condition.num_quantizers}": estimate.mean
        for row in table
        for domain in ((ALL_DOMAINS, row.domain) if is_one_domain else (row.domain,))
        for key, estimate in row.estimates.items()
    }


def score_renditions(
    clip_id: str,
    labels: Mapping[str, str],
    seconds: float,
    renditions: Sequence[Rendition],
    metrics: Mapping[str, Metric],
) -> ClipRow:
    """Score what was made of one clip of `seconds`; `labels` name its domain."""
    conditions = []
    for item in renditions:
        scores = score_pair(metrics, Pair(item.reference, item.degraded, item.sampling_rate, labels))
        conditions.append(ConditionRow(item.condition, scores.values, scores.errors, scores.official))
    return ClipRow(clip_id, labels["domain"], clip_id, seconds, tuple(conditions))


def _row(clip: EvaluationClip, renderer: CodecRenderer, metrics: Mapping[str, Metric]) -> ClipRow:
    rendered = renderer.render(clip, *clip.read())
    labels = {"domain": clip.domain} | clip.labels
    scored = score_renditions(clip.id, labels, rendered.seconds, rendered.renditions, metrics)
    failed = [ConditionRow(condition, failure=reason) for condition, reason in rendered.failures.items()]
    return ClipRow(clip.id, clip.domain, clip.id, rendered.seconds, (*failed, *scored.conditions))
