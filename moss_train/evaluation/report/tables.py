"""The tables of an evaluation: conditions by metrics, and the comparison with another evaluation."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moss_train.config.old_names import present_column
from moss_train.evaluation.metrics.base import Column, Metric
from moss_train.evaluation.metrics.codes import CodebookUsage
from moss_train.evaluation.reconstruct import ANCHORS, Condition
from moss_train.evaluation.results import ROWS_FILE, ClipRow, read_rows
from moss_train.evaluation.statistics import ConfidenceInterval, SummaryRow, paired_difference
from moss_train.utils.errors import UserError
from moss_train.utils.files import markdown_table, read_json

FEWEST_CLIPS = 6  # with the same sign by chance in 2 * 0.5 ** 6 = 3 % of all cases
SURE = f"the interval does not contain 0 and rests on at least {FEWEST_CLIPS} clips"


@dataclass(frozen=True)
class Table:
    """Rows and columns, with the notes that a reader needs."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[SummaryRow, ...]
    effective_bitrates: dict[int, float] = field(default_factory=dict)  # by number of levels
    real_time_factors: dict[int, float] = field(default_factory=dict)  # computing over audio time, by number of levels
    footnotes: tuple[str, ...] = ()


def markdown(table: Table) -> str:
    """Return the table as Markdown: arrows show which direction is better; the intervals are only in the CSV."""
    header, *rows = table_cells(table)
    notes = [f"- {note}" for note in table.footnotes]
    return "\n".join([f"# {table.title}", "", *markdown_table(header, rows), "", *notes, ""])


def comma_separated(table: Table) -> str:
    """Return the table as CSV: every value of every domain with its interval and number of clips, unrounded."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    parts = ("", "_low", "_high", "_clips")
    names = [f"{column.key}{part}" for column in table.columns for part in parts]
    fixed = ["domain", "system", "num_quantizers", "bps", "effective_bps", "real_time_factor", "clips", "failed"]
    writer.writerow([*fixed, *names])
    for row in table.rows:
        levels = row.condition.num_quantizers
        speed = (table.effective_bitrates.get(levels or 0), table.real_time_factors.get(levels or 0))
        values = [row.domain, *vars(row.condition).values(), *speed, row.num_clips, row.num_failed]
        for column in table.columns:
            estimate = row.estimates.get(column.key)
            values += ["", "", "", 0] if estimate is None else list(asdict(estimate).values())
        writer.writerow(["" if value is None else value for value in values])
    return output.getvalue()


def codebook_csv(levels: Sequence[CodebookUsage]) -> str:
    """Return CSV with one line per level; there has to be at least one."""
    entries = [asdict(level) | {"relative_entropy": level.relative_entropy} for level in levels]
    output = io.StringIO()
    writer = csv.DictWriter(output, entries[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(entries)
    return output.getvalue()


def table_cells(table: Table) -> list[list[str]]:
    """Return the table as texts, the header first."""

    def text(value: float | None, decimals: int = 0) -> str:
        return "–" if value is None else f"{value:.{decimals}f}"

    effective, speed = ["eff. bps"] * bool(table.effective_bitrates), ["RTF"] * bool(table.real_time_factors)
    titles = [f"{column.title} {'↑' if column.is_higher_better else '↓'}" for column in table.columns]
    lines = [["domain", "system", "levels", "bps", *effective, *titles, *speed, "valid/total"]]
    for row in table.rows:
        levels = row.condition.num_quantizers
        cells = [row.domain, row.condition.system, text(levels), text(row.condition.bitrate)]
        if effective:
            cells.append(text(table.effective_bitrates.get(levels or 0)))
        for column in table.columns:
            estimate = row.estimates.get(column.key)
            cells.append(text(None if estimate is None else estimate.mean, column.decimals))
        if speed:
            cells.append(text(table.real_time_factors.get(levels or 0), 3))
        lines.append([*cells, f"{row.num_clips - row.num_failed}/{row.num_clips}"])
    return lines


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

    @property
    def is_sure(self) -> bool:
        """Whether the interval excludes 0, of enough clips: of fewer, all have the same sign too often by chance."""
        value = self.estimate
        return value.num_clips >= FEWEST_CLIPS and (value.low > 0 or value.high < 0)


@dataclass(frozen=True)
class Comparison:
    """All differences to one other evaluation."""

    other: str
    differences: tuple[Difference, ...]
    skipped: dict[str, str]  # metric -> why it is not compared
    summary: tuple[SummaryRow, ...]  # the other's rows, for the plots

    def markdown(self) -> str:
        """Return a table with one line per difference; those that are sure are marked."""
        rows = []
        for item in self.differences:
            value = item.estimate
            sure = " *" if item.is_sure else ""
            interval = f"{value.low:+.3f} to {value.high:+.3f}"
            difference = f"{value.mean:+.3f}{sure}"
            rows.append((item.first.label, item.second.label, item.column, difference, interval, value.num_clips))
        lines = markdown_table(("this", "other", "measure", "difference", "95 %", "clips"), rows)
        notes = [f"- {name} is not compared: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(["", f"## Against {self.other}", "", *lines, "", f"- * {SURE}", *notes, ""])


def load_evaluation(folder: Path) -> OtherEvaluation:
    """Read an evaluation back. Raises UserError if the folder does not hold a finished one."""
    path = folder / "results.json"
    try:
        stored = read_json(path)
        conditions = tuple(Condition(**entry) for entry in stored["conditions"])
        summary = []
        for entry in stored["rows"]:
            entry["condition"] = Condition(**entry["condition"])
            estimates = entry["estimates"].items()
            entry["estimates"] = {present_column(key): ConfidenceInterval(**value) for key, value in estimates}
            summary.append(SummaryRow(**entry))
        metrics = stored["metrics"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"compare={folder} holds no finished evaluation (no readable results.json)") from error
    rows = tuple(read_rows(folder / ROWS_FILE))
    return OtherEvaluation(folder.resolve().name, rows, conditions, metrics, tuple(summary))


def compare(
    rows: Sequence[ClipRow], conditions: Sequence[Condition], metrics: Mapping[str, Metric], other: OtherEvaluation
) -> Comparison:
    """Compare every number of levels with that of the other evaluation at the nearest bitrate.

    Only metrics with the same description in both are compared.
    """
    skipped = {
        name: f"{metric.description} here, {other.descriptions.get(name, 'not measured')} there"
        for name, metric in metrics.items()
        if other.descriptions.get(name) != metric.description
    }
    columns = [column for name, metric in metrics.items() if name not in skipped for column in metric.columns]
    differences = []
    candidates = [theirs for theirs in other.conditions if theirs.system not in ANCHORS]
    for own in (condition for condition in conditions if condition.system not in ANCHORS):
        if own.bitrate is not None and all(theirs.bitrate is not None for theirs in candidates):
            distances = {theirs: abs((theirs.bitrate or 0.0) - own.bitrate) for theirs in candidates}
            nearest = min(distances, key=distances.__getitem__, default=None)
        else:
            nearest = next((theirs for theirs in candidates if theirs.num_quantizers == own.num_quantizers), None)
        if nearest is None:
            continue
        for column in columns:
            estimate = paired_difference(rows, other.rows, (own, nearest), column)
            if estimate is not None:
                differences.append(Difference(column.title, column.is_higher_better, own, nearest, estimate))
    if columns and not differences:
        skipped["every metric"] = "the two have no clips in common"
    return Comparison(other.name, tuple(differences), skipped, other.summary)
