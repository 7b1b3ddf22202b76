"""The tables of an evaluation: conditions by metrics, and the comparison with another evaluation."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moss_train.config.section import present_column
from moss_train.evaluation.metrics.base import Column, Metric
from moss_train.evaluation.metrics.codes import CodebookUsage
from moss_train.evaluation.reconstruct import ANCHORS, Condition
from moss_train.evaluation.results import ROWS_FILE, ClipRow, read_rows
from moss_train.evaluation.statistics import ConfidenceInterval, SummaryRow, paired_difference
from moss_train.utils.errors import UserError
from moss_train.utils.files import markdown_table, read_json

EMPTY = "–"


@dataclass(frozen=True)
class Table:
    """Rows and columns with what a reader has to know about them."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[SummaryRow, ...]
    effective_bitrates: dict[int, float] = field(default_factory=dict)  # by number of levels
    real_time_factors: dict[int, float] = field(default_factory=dict)  # computing over audio time, by number of levels
    footnotes: tuple[str, ...] = ()


def markdown(table: Table) -> str:
    """The table for reading: an arrow says which way is better, intervals are in the CSV."""
    header, *rows = table_cells(table)
    notes = [f"- {note}" for note in table.footnotes]
    return "\n".join([f"# {table.title}", "", *markdown_table(header, rows), "", *notes, ""])


def comma_separated(table: Table) -> str:
    """Every value of every domain with its interval and number of clips, unrounded."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    parts = ("", "_low", "_high", "_clips")
    names = [f"{column.key}{part}" for column in table.columns for part in parts]
    fixed = ["domain", "system", "num_quantizers", "bps", "effective_bps", "real_time_factor", "clips", "failed"]
    writer.writerow([*fixed, *names])
    for row in table.rows:
        levels = row.condition.num_quantizers
        speed = (table.effective_bitrates.get(levels or 0), table.real_time_factors.get(levels or 0))
        values = [
            row.domain,
            row.condition.system,
            levels,
            row.condition.bitrate,
            *speed,
            row.num_clips,
            row.num_failed,
        ]
        for column in table.columns:
            estimate = row.estimates.get(column.key)
            values += ["", "", "", 0] if estimate is None else list(asdict(estimate).values())
        writer.writerow(["" if value is None else value for value in values])
    return output.getvalue()


def codebook_csv(levels: Sequence[CodebookUsage]) -> str:
    """One line per level."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    for index, level in enumerate(levels):
        entry = asdict(level) | {"relative_entropy": level.relative_entropy}
        if index == 0:
            writer.writerow(entry)
        writer.writerow(entry.values())
    return output.getvalue()


def table_cells(table: Table) -> list[list[str]]:
    """The table as texts, the header first."""
    return [_header(table), *(_cells(table, row) for row in table.rows)]


def _header(table: Table) -> list[str]:
    titles = [f"{column.title} {'↑' if column.is_higher_better else '↓'}" for column in table.columns]
    effective = ["eff. bps"] * bool(table.effective_bitrates)
    speed = ["RTF"] * bool(table.real_time_factors)
    return ["domain", "system", "levels", "bps", *effective, *titles, *speed, "valid/total"]


def _cells(table: Table, row: SummaryRow) -> list[str]:
    condition = row.condition
    cells = [
        row.domain,
        condition.system,
        _number(condition.num_quantizers),
        _number(condition.bitrate, "{:.0f}".format),
    ]
    levels = condition.num_quantizers or 0
    if table.effective_bitrates:
        cells.append(_number(table.effective_bitrates.get(levels), "{:.0f}".format))
    for column in table.columns:
        shown = column.key in row.estimates
        cells.append(f"{row.estimates[column.key].mean:.{column.decimals}f}" if shown else EMPTY)
    if table.real_time_factors:
        cells.append(_number(table.real_time_factors.get(levels), "{:.3f}".format))
    return [*cells, f"{row.num_clips - row.num_failed}/{row.num_clips}"]


def _number(value: float | None, form: Callable[[float], str] = str) -> str:
    return EMPTY if value is None else form(value)


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
    estimate: ConfidenceInterval


@dataclass(frozen=True)
class Comparison:
    """All differences to one other evaluation."""

    other: str
    differences: tuple[Difference, ...]
    skipped: dict[str, str]  # metric -> why it is not compared
    summary: tuple[SummaryRow, ...]  # the other's rows, for the plots

    def markdown(self) -> str:
        """A table with one line per difference; an interval without 0 is marked."""
        rows = []
        for item in self.differences:
            value = item.estimate
            sure = " *" if value.low > 0 or value.high < 0 else ""
            interval = f"{value.low:+.3f} to {value.high:+.3f}"
            difference = f"{value.mean:+.3f}{sure}"
            rows.append((item.first.label, item.second.label, item.column, difference, interval, value.num_clips))
        lines = markdown_table(("this", "other", "measure", "difference", "95 %", "clips"), rows)
        notes = [f"- {name} is not compared: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(
            ["", f"## Against {self.other}", "", *lines, "", "- * the interval does not contain 0", *notes, ""]
        )


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
    estimates = {present_column(key): ConfidenceInterval(**value) for key, value in entry["estimates"].items()}
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
