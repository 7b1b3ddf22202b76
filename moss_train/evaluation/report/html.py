"""Write the report of an evaluation as one self-contained HTML page."""

import base64
import csv
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from moss_train.audio.io import read_audio
from moss_train.evaluation.metrics.base import Column, missing_package
from moss_train.evaluation.metrics.codes import CodebookUsage
from moss_train.evaluation.reconstruct import ANCHORS, RESAMPLE_ONLY, Condition
from moss_train.evaluation.report.tables import Comparison, Difference, Table, table_cells
from moss_train.evaluation.results import AUDIO_FOLDER, ClipRow, file_name
from moss_train.evaluation.statistics import ALL_DOMAINS, ConfidenceInterval, SummaryRow
from moss_train.plotting import new_figure, save_spectrograms
from moss_train.utils.files import atomic_write

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


def usage_plot(levels: Sequence[CodebookUsage]) -> str:
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
    figure = new_figure(*PANEL_INCHES)
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


TEMPLATE = Path(__file__).with_name("report_template.html")


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    table: Table
    rows: Sequence[ClipRow]
    levels: Sequence[CodebookUsage]
    comparisons: Sequence[Comparison]
    folder: Path  # of the evaluation, with the audio that was kept


def write_report(path: Path, report: Report) -> None:
    """Write the page; without matplotlib it has no plots and says so."""
    without_plots = missing_package("matplotlib")
    parts = {
        "title": html.escape(report.table.title),
        "table": "".join(_tables(report.table)),
        "footnotes": "".join(f"<li>{html.escape(note)}</li>" for note in report.table.footnotes),
        "plots": f"<p>{without_plots}</p>" if without_plots else "".join(_plots(report)),
        "comparisons": "".join(map(_comparison, report.comparisons)),
        "clips": "".join(_clips(report, draw=without_plots is None)),
    }
    with atomic_write(path) as temporary:
        temporary.write_text(Template(TEMPLATE.read_text("utf-8")).substitute(parts), encoding="utf-8")


def _tables(table: Table) -> Iterator[str]:
    """A table per domain, without the columns that have no values there."""
    for domain in dict.fromkeys(row.domain for row in table.rows):
        rows = tuple(row for row in table.rows if row.domain == domain)
        columns = tuple(column for column in table.columns if any(column.key in row.estimates for row in rows))
        yield f"<h2>{html.escape(domain)}</h2>{_table(replace(table, rows=rows, columns=columns))}"


def _table(table: Table) -> str:
    """Rows of one domain; the interval of a value is seen when one points at it."""
    (_, system, _, *header), *lines = table_cells(table)
    before = 1 + bool(table.effective_bitrates)
    after = len(header) - before - len(table.columns)
    body = []
    for (_, _, _, *cells), row in zip(lines, table.rows, strict=True):
        hints = [_interval(row.estimates.get(column.key), column.decimals) for column in table.columns]
        hints = [""] * before + hints + [""] * after
        values = "".join(f"<td{hint}>{html.escape(cell)}</td>" for cell, hint in zip(cells, hints, strict=True))
        kind = ' class="anchor"' if row.condition.system in ANCHORS else ""
        body.append(f"<tr{kind}><td>{html.escape(row.condition.label)}</td>{values}</tr>")
    return _wide([system, *header], body)


def _interval(value: ConfidenceInterval | None, decimals: int) -> str:
    if value is None:
        return ""
    return f' title="95 %: {value.low:.{decimals}f} to {value.high:.{decimals}f}, {value.num_clips} clips"'


def _wide(header: Sequence[str], body: Sequence[str]) -> str:
    """A table that scrolls sideways below its first column where the page is narrower."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _plots(report: Report) -> Iterator[str]:
    others = [(comparison.other, comparison.summary) for comparison in report.comparisons]
    for column in report.table.columns:
        plot = bitrate_plot(column, report.table.rows, others)
        if plot is not None:
            yield f'<figure class="plot" aria-label="{html.escape(column.title)}">{plot}</figure>'
    if report.levels:
        yield f'<figure class="plot" aria-label="Use of the codebooks">{usage_plot(report.levels)}</figure>'


def _comparison(comparison: Comparison) -> str:
    """A line per pair of depths, a column per measure; what is sure to be better or worse is coloured."""
    titles = list(dict.fromkeys(item.column for item in comparison.differences))
    lines: dict[str, dict[str, Difference]] = {}
    for item in comparison.differences:
        lines.setdefault(f"{item.first.label} − {item.second.label}", {})[item.column] = item
    body = [
        f"<tr><td>{html.escape(label)}</td>{''.join(_difference(found.get(title)) for title in titles)}</tr>"
        for label, found in lines.items()
    ]
    notes = "".join(f"<li>{html.escape(f'{name}: {reason}')}</li>" for name, reason in comparison.skipped.items())
    skipped = f"<p>Not compared:</p><ul>{notes}</ul>" if notes else ""
    legend = '<p class="notes">Mean differences, clip by clip; coloured where the 95 % interval does not contain 0.</p>'
    return f"<h2>Against {html.escape(comparison.other)}</h2>{_wide(['difference', *titles], body)}{legend}{skipped}"


def _difference(item: Difference | None) -> str:
    if item is None:
        return "<td></td>"
    value = item.estimate
    is_better = value.mean > 0 if item.is_higher_better else value.mean < 0
    kind = ("better" if is_better else "worse") if value.low > 0 or value.high < 0 else "open"
    return f'<td class="{kind}"{_interval(value, 3)}>{value.mean:+.3f}</td>'


def _clips(report: Report, draw: bool) -> Iterator[str]:
    """Players and spectrograms of every clip whose audio was kept."""
    for row in report.rows:
        folder = report.folder / AUDIO_FOLDER / row.key
        if not (folder / "original.flac").is_file():
            continue
        depths = [entry.condition for entry in row.conditions if entry.condition.system not in ANCHORS]
        depths.sort(key=lambda condition: (condition.system, condition.num_quantizers or 0))
        players = [_player("original", folder / "original.flac")]
        players += [_player(depth.label, folder / f"{file_name(depth)}.flac") for depth in depths]
        picture = _spectrograms(folder, depths) if draw else ""
        name = html.escape(f"{row.domain}: {row.clip}")
        inner = f"<h3>{name}</h3>{''.join(players)}{picture}"
        yield f'<section class="clip" data-clip="{html.escape(row.clip)}">{inner}</section>'


def _player(label: str, path: Path) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(label)
    audio = f'<audio controls preload="metadata" src="data:audio/flac;base64,{data}"></audio>'
    return f'<div class="player"><span class="name">{name}</span>{audio}</div>'


def _spectrograms(folder: Path, depths: Sequence[Condition]) -> str:
    """Original, fewest and most levels, one below the other."""
    paths = {"original": folder / "original.flac"}
    paths |= {depth.label: folder / f"{file_name(depth)}.flac" for depth in (*depths[:1], *depths[-1:])}
    audio = {label: read_audio(path) for label, path in paths.items() if path.is_file()}
    rate = audio["original"][1]
    same = {
        label: waveform for label, (waveform, its_rate) in audio.items() if its_rate == rate and waveform.shape[-1] > 1
    }
    if len(same) < 2:
        return ""
    buffer = io.BytesIO()
    save_spectrograms(same, rate, buffer)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="spectrogram" alt="Spectrograms" src="data:image/png;base64,{data}">'
