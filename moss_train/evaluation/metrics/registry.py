"""The list of all metrics, for `evaluate` and for the validation of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from moss_train.config.build import build
from moss_train.evaluation.metrics.asr import choose_backend
from moss_train.evaluation.metrics.base import Metric, columns_of
from moss_train.evaluation.metrics.pitch import PatchRateBuzz, PitchAccuracy, VoicePulses
from moss_train.evaluation.metrics.signal import PROFILES, DistillMos, Dnsmos, signal_metrics
from moss_train.evaluation.metrics.speaker import WavLMSimilarity
from moss_train.utils.errors import UserError


def build_metrics(
    wanted: Sequence[str | Mapping[str, Any]],
    path: str = "metrics",
    *,
    profile: str = "official",
    speaker_model: str | None = None,
    recognition: str = "auto",
    recognition_model: str | None = None,
) -> dict[str, Metric]:
    """Build metrics in the order of the paper's table, whatever the order in `wanted`; the user's own come last.

    Args:
        wanted: names, and `_target_` nodes of the user's classes. `text_model` is skipped: it is measured where the
            codes are made (see `TextCrossEntropy`).
        path: of `wanted` in the configuration, for errors.
        profile, speaker_model, recognition, recognition_model: see configs/evaluate.yaml.

    Returns:
        Metrics by name; one of the user's is named after its class.

    Raises:
        UserError: a node that cannot be built, is not a metric, or has the same column as another metric.
    """
    known: dict[str, Metric] = {
        "speaker": WavLMSimilarity(speaker_model),
        **signal_metrics(PROFILES[profile]),
        "pitch": PitchAccuracy(),
        "buzz": PatchRateBuzz(),
        "pulses": VoicePulses(),
        "recognition": choose_backend(recognition, recognition_model),
        "dnsmos": Dnsmos(),
        "distillmos": DistillMos(),
    }
    metrics = {name: metric for name, metric in known.items() if name in wanted}
    for number, node in enumerate(wanted):
        if isinstance(node, str):
            continue
        metric = build(node, path=f"{path}.{number}")
        name = type(metric).__name__
        if lacking := [key for key in ("columns", "description", "missing", "score") if not hasattr(metric, key)]:
            raise UserError(f"{path}.{number}: {name} is no metric, it has no {', '.join(lacking)}")
        taken = {column.key for column in columns_of(metrics)}
        if again := sorted({column.key for column in metric.columns} & taken):
            raise UserError(f"{path}.{number}: {name} has the column {again[0]!r}, which another metric has")
        metrics[name] = metric
    return metrics
