"""The measures of the table on a few clips in memory, for a look during training."""

from collections.abc import Mapping, Sequence

from moss_train.evaluation.codecs import Codec
from moss_train.evaluation.metrics import Metric, Pair, columns_of, score_pair
from moss_train.evaluation.rendering import CodecRenderer, EvaluationClip
from moss_train.evaluation.results import ClipRow, ConditionRow
from moss_train.evaluation.summary import summarize


def validation_scores(
    codec: Codec, clips: Sequence[EvaluationClip], num_quantizers: Sequence[int], metrics: Mapping[str, Metric]
) -> dict[str, float]:
    """Means by `domain/measure/levels`, such as `speech/stoi/8`; nothing is written.

    The model is left in evaluation mode by its codec. UserError for a clip that cannot be read.
    """
    renderer = CodecRenderer(codec, num_quantizers, clips, with_anchors=False)
    rows = [_row(clip, renderer, metrics) for clip in clips]
    return {
        f"{row.domain}/{key}/{row.condition.num_quantizers}": estimate.mean
        for row in summarize(rows, renderer.conditions, columns_of(metrics))
        for key, estimate in row.estimates.items()
    }


def _row(clip: EvaluationClip, renderer: CodecRenderer, metrics: Mapping[str, Metric]) -> ClipRow:
    rendered = renderer.render(clip, *clip.read())
    labels = {"domain": clip.domain} | clip.labels
    conditions = [ConditionRow(condition, failure=reason) for condition, reason in rendered.failures.items()]
    for item in rendered.renditions:
        scores = score_pair(metrics, Pair(item.reference, item.degraded, item.sampling_rate, labels))
        conditions.append(ConditionRow(item.condition, scores.values, scores.errors, scores.official))
    return ClipRow(clip.id, clip.domain, clip.id, rendered.seconds, tuple(conditions))
