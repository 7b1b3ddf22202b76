"""Plots of an evaluation as SVG text: metric against bitrate, and the use of the codebooks."""

import csv
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from moss_train.evaluation.metrics.base import Column
from moss_train.evaluation.metrics.codebooks import LevelUse
from moss_train.evaluation.reconstruct import RESAMPLE_ONLY
from moss_train.evaluation.statistics import ALL_DOMAINS, SummaryRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = (4.2, 3.0)
PUBLISHED_FILE = Path(__file__).with_name("published_results.csv")
PUBLISHED_COLUMNS = {
    "sim_wavlm": ("sim_en", "sim_zh"),
    "stoi": ("stoi_en", "stoi_zh"),
    "pesq_nb": ("pesq_nb_en", "pesq_nb_zh"),
    "pesq_wb": ("pesq_wb_en", "pesq_wb_zh"),
    "mel_loss": ("mel_loss_audio", "mel_loss_music"),
    "stft_distance": ("stft_distance_audio", "stft_distance_music"),
}
"""Columns of the published table by ours: the first is drawn. SIM of another network has no published values."""


def bitrate_plot(
    column: Column, rows: Sequence[SummaryRow], others: Sequence[tuple[str, Sequence[SummaryRow]]] = ()
) -> str | None:
    """One column against the bitrate, a line per domain with its intervals; None when no row has a bitrate.

    others: (name, rows) of other evaluations, dashed. The published values of the same measure are grey: they come from
    other recordings. Needs matplotlib.
    """
    lines = _lines(column, rows)
    if not lines or not column.is_plotted:
        return None
    figure, axes = _figure()
    for index, (domain, points) in enumerate(lines.items()):
        _draw_line(axes, points, column, domain, f"C{index}", "-o")
    for name, theirs in others:
        for domain, points in _lines(column, theirs).items():
            color = f"C{list(lines).index(domain)}" if domain in lines else "black"
            _draw_line(axes, points, column, f"{domain}, {name}", color, "--s")
    if column.key != "si_sdr":  # of which there is no ceiling: only the last bit keeps it from being infinite
        _draw_ceilings(axes, column, rows, list(lines))
    _draw_published(axes, column.key)
    axes.set_xlabel("bitrate (bit/s)")
    axes.set_title(f"{column.title} ({'higher' if column.is_higher_better else 'lower'} is better)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return _svg(figure)


def usage_plot(levels: Sequence[LevelUse]) -> str:
    """Bars per level: share of codes in use, entropy over its maximum, and the usage that chance would give."""
    figure, axes = _figure()
    places = [level.level for level in levels]
    axes.bar([place - 0.2 for place in places], [level.usage for level in levels], width=0.4, label="codes in use")
    entropies = [level.relative_entropy for level in levels]
    axes.bar([place + 0.2 for place in places], entropies, width=0.4, label="entropy / maximum")
    axes.plot(places, [level.expected_usage for level in levels], "k_", label="usage if all were equally likely")
    axes.set_xlabel("level")
    axes.set_ylim(0, 1.05)
    axes.set_title("Use of the codebooks", fontsize=10)
    axes.legend(fontsize=7)
    return _svg(figure)


def _lines(column: Column, rows: Sequence[SummaryRow]) -> dict[str, list[SummaryRow]]:
    """Rows with a bitrate and a value, by domain, the mean of all domains left out."""
    lines: dict[str, list[SummaryRow]] = {}
    for row in rows:
        if row.condition.bitrate is not None and column.key in row.estimates and row.domain != ALL_DOMAINS:
            lines.setdefault(row.domain, []).append(row)
    return {domain: sorted(points, key=lambda row: row.condition.bitrate or 0) for domain, points in lines.items()}


def _draw_line(axes: "Axes", rows: Sequence[SummaryRow], column: Column, label: str, color: str, style: str) -> None:
    bitrates = [row.condition.bitrate or 0.0 for row in rows]
    estimates = [row.estimates[column.key] for row in rows]
    axes.plot(bitrates, [value.mean for value in estimates], style, color=color, label=label, markersize=4)
    axes.fill_between(
        bitrates, [value.low for value in estimates], [value.high for value in estimates], color=color, alpha=0.15
    )


def _draw_ceilings(axes: "Axes", column: Column, rows: Sequence[SummaryRow], domains: list[str]) -> None:
    for row in rows:
        if row.condition.system == RESAMPLE_ONLY and row.domain in domains and column.key in row.estimates:
            color = f"C{domains.index(row.domain)}"
            axes.axhline(row.estimates[column.key].mean, color=color, linestyle=":", linewidth=1)


def _draw_published(axes: "Axes", key: str) -> None:
    names = PUBLISHED_COLUMNS.get(key)
    if names is None:
        return
    label = f"published {names[0].rsplit('_', 1)[1]}, other data"
    for is_moss, marker in ((True, "x"), (False, ".")):
        points = [
            (float(row["bps"]), float(row[names[0]]))
            for row in published()
            if row[names[0]] and row["model"].startswith("MOSS") == is_moss
        ]
        name = f"{label}: MOSS" if is_moss else f"{label}: other codecs"
        axes.plot(*zip(*points, strict=True), marker, color="0.6", label=name, markersize=5, zorder=0)


@lru_cache(maxsize=1)
def published() -> tuple[dict[str, str], ...]:
    """The published table: LibriSpeech and AISHELL-2, AudioSet and MUSDB."""
    return tuple(csv.DictReader(PUBLISHED_FILE.read_text("utf-8").splitlines()))


def _figure() -> tuple["Figure", "Axes"]:
    # The object interface, not pyplot: no global state, no window, no backend to choose.
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL_INCHES, layout="constrained")
    return figure, figure.subplots()


def _svg(figure: "Figure") -> str:
    import matplotlib

    for axes in figure.axes:  # a codec or a folder may be called anything, also half a formula
        legend = axes.get_legend()
        for text in (axes.title, *(legend.get_texts() if legend else ())):
            text.set_parse_math(False)
    buffer = io.StringIO()
    # Without salt and date the text is the same in every run.
    with matplotlib.rc_context({"svg.hashsalt": "moss_train", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
