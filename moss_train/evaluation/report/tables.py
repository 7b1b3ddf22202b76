"""The table of an evaluation as Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from moss_train.evaluation.metrics.base import Column
from moss_train.evaluation.metrics.codebooks import LevelUse
from moss_train.evaluation.statistics import SummaryRow

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
    cells = table_cells(table)
    lines = [_markdown_line(cells[0]), "|---" * len(cells[0]) + "|", *map(_markdown_line, cells[1:])]
    notes = [f"- {note}" for note in table.footnotes]
    return "\n".join([f"# {table.title}", "", *lines, "", *notes, ""])


def latex(table: Table) -> str:
    """A booktabs tabular with the same cells."""
    cells = [_header(table, r"$\uparrow$", r"$\downarrow$"), *(_cells(table, row) for row in table.rows)]
    lines = [" & ".join(_latex_text(cell) for cell in line) + r" \\" for line in cells]
    columns = "ll" + "r" * (len(cells[0]) - 2)
    notes = [f"% {note}" for note in table.footnotes]
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*notes, *body, r"\end{tabular}", ""])


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


def codebook_csv(levels: Sequence[LevelUse]) -> str:
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
    return [_header(table, "↑", "↓"), *(_cells(table, row) for row in table.rows)]


def _header(table: Table, up: str, down: str) -> list[str]:
    titles = [f"{column.title} {up if column.is_higher_better else down}" for column in table.columns]
    effective = ["eff. bps"] * bool(table.effective_bitrates)
    speed = ["RTF"] * bool(table.real_time_factors)
    return ["domain", "system", "Nq", "bps", *effective, *titles, *speed, "ok/n"]


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


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _latex_text(text: str) -> str:
    for plain in "&%#_":
        text = text.replace(plain, f"\\{plain}")
    return text.replace(EMPTY, "--")
