"""Sets one evaluation against another: differences over the clips that both have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moss_train.evaluation.metrics.base import Column, Metric
from moss_train.evaluation.reconstruct import ANCHORS, Condition
from moss_train.evaluation.results import ROWS_FILE, ClipRow, read_rows
from moss_train.evaluation.statistics import Estimate, SummaryRow, paired_difference
from moss_train.utils.errors import UserError
from moss_train.utils.files import read_json


@dataclass(frozen=True)
class OtherEvaluation:
    """A finished evaluation, read back from its folder."""

    name: str
    rows: tuple[ClipRow, ...]
    conditions: tuple[Condition, ...]
    descriptions: dict[str, str]  # of its metrics
    summary: tuple[SummaryRow, ...]


@dataclass(frozen=True)
class Difference:
    """First minus second, over the clips that both have."""

    column: str  # title
    is_higher_better: bool
    first: Condition
    second: Condition
    estimate: Estimate


@dataclass(frozen=True)
class Comparison:
    """All differences to one other evaluation."""

    other: str
    differences: tuple[Difference, ...]
    skipped: dict[str, str]  # metric -> why it is not compared
    summary: tuple[SummaryRow, ...]  # the other's rows, for the plots

    def markdown(self) -> str:
        """A table with one line per difference; an interval without 0 is marked."""
        lines = [
            f"## Against {self.other}",
            "",
            "| this | other | measure | difference | 95 % | clips |",
            "|---" * 6 + "|",
        ]
        for item in self.differences:
            value = item.estimate
            sure = " *" if value.low > 0 or value.high < 0 else ""
            interval = f"{value.low:+.3f} to {value.high:+.3f}"
            cells = (
                item.first.label,
                item.second.label,
                item.column,
                f"{value.mean:+.3f}{sure}",
                interval,
                value.num_clips,
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        notes = [f"- {name} is not compared: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(["", *lines, "", "- * the interval does not contain 0", *notes, ""])


def load_evaluation(folder: Path) -> OtherEvaluation:
    """Read an evaluation back. Raises UserError when the folder holds none that is finished."""
    path = folder / "results.json"
    try:
        stored = read_json(path)
        conditions = tuple(Condition(**entry) for entry in stored["conditions"])
        summary = tuple(_summary_row(entry) for entry in stored["rows"])
        metrics = stored["metrics"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"compare={folder} holds no finished evaluation (no readable results.json)") from error
    rows = tuple(read_rows(folder / ROWS_FILE))
    return OtherEvaluation(folder.resolve().name, rows, conditions, metrics, summary)


def _summary_row(entry: dict) -> SummaryRow:
    estimates = {key: Estimate(**value) for key, value in entry["estimates"].items()}
    return SummaryRow(**entry | {"condition": Condition(**entry["condition"]), "estimates": estimates})


def compare(
    rows: Sequence[ClipRow], conditions: Sequence[Condition], metrics: Mapping[str, Metric], other: OtherEvaluation
) -> Comparison:
    """Differences of every depth to the other's depth of the nearest bitrate, for metrics of the same definition."""
    skipped = {
        name: f"{metric.description} here, {other.descriptions.get(name, 'not measured')} there"
        for name, metric in metrics.items()
        if other.descriptions.get(name) != metric.description
    }
    columns = [column for name, metric in metrics.items() if name not in skipped for column in metric.columns]
    differences = []
    for condition in (condition for condition in conditions if condition.system not in ANCHORS):
        nearest = _nearest(condition, other.conditions)
        if nearest is not None:
            differences += _differences(rows, other.rows, condition, nearest, columns)
    if columns and not differences:
        skipped["every metric"] = "the two have no clips in common"
    return Comparison(other.name, tuple(differences), skipped, other.summary)


def _nearest(condition: Condition, others: Sequence[Condition]) -> Condition | None:
    candidates = [other for other in others if other.system not in ANCHORS]
    if condition.bitrate is not None and all(other.bitrate is not None for other in candidates):
        wanted = condition.bitrate
        return min(candidates, key=lambda other: abs((other.bitrate or 0.0) - wanted), default=None)
    return next((other for other in candidates if other.num_quantizers == condition.num_quantizers), None)


def _differences(
    rows: Sequence[ClipRow], others: Sequence[ClipRow], first: Condition, second: Condition, columns: Sequence[Column]
) -> list[Difference]:
    estimates = ((column, paired_difference(rows, others, (first, second), column)) for column in columns)
    return [
        Difference(column.title, column.is_higher_better, first, second, estimate)
        for column, estimate in estimates
        if estimate is not None
    ]
