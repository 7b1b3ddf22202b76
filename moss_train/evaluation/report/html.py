"""Write the report of an evaluation as one self-contained HTML page."""

import base64
import csv
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from moss_train.audio.io import read_audio
from moss_train.evaluation.metrics.base import Column, missing_package
from moss_train.evaluation.metrics.codes import CodebookUsage
from moss_train.evaluation.reconstruct import ANCHORS, RESAMPLE_ONLY
from moss_train.evaluation.report.tables import SURE, Comparison, Difference, Table, table_cells
from moss_train.evaluation.results import AUDIO_FOLDER, ClipRow, file_name
from moss_train.evaluation.statistics import ALL_DOMAINS, ConfidenceInterval, SummaryRow
from moss_train.plotting import new_figure, save_spectrograms
from moss_train.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PANEL_INCHES = (4.2, 3.0)
PUBLISHED_FILE = Path(__file__).with_name("published_results.csv")
PUBLISHED_COLUMNS = {
    "sim_wavlm": "sim_en",
    "stoi": "stoi_en",
    "pesq_nb": "pesq_nb_en",
    "pesq_wb": "pesq_wb_en",
    "mel_loss": "mel_loss_audio",
    "stft_distance": "stft_distance_audio",
}
"""By our column: the column of the paper's table (on LibriSpeech and AudioSet) with the same measure."""


def bitrate_plot(
    column: Column, rows: Sequence[SummaryRow], others: Sequence[tuple[str, Sequence[SummaryRow]]] = ()
) -> str | None:
    """Plot a column over the bitrate as SVG, with intervals; None if no row has a bitrate.

    There is a line per domain, and per system where there are several, as in `pairs=`.

    others: (name, rows) of other evaluations, dashed. The published values of the same measure are grey: they come from
    other recordings. Needs matplotlib.
    """
    key, own = column.key, _lines(column, rows)
    if not own or not column.is_plotted:
        return None
    figure = new_figure(*PANEL_INCHES)
    axes = figure.subplots()
    colors = {name: f"C{index}" for index, name in enumerate(own)}
    lines = [(name, points, name, "-o") for name, points in own.items()]
    for other, theirs in others:
        lines += [(name, points, f"{name}, {other}", "--s") for name, points in _lines(column, theirs).items()]
    for name, points, label, style in lines:
        color = colors.get(name, "black")
        bitrates = [row.condition.bitrate or 0.0 for row in points]
        values = [row.estimates[key] for row in points]
        axes.plot(bitrates, [value.mean for value in values], style, color=color, label=label, markersize=4)
        low, high = [value.low for value in values], [value.high for value in values]
        axes.fill_between(bitrates, low, high, color=color, alpha=0.15)
    for row in rows if key != "si_sdr" else ():  # its ceiling would be infinite but for rounding to 16 bits
        if row.condition.system == RESAMPLE_ONLY and row.domain in own and key in row.estimates:
            axes.axhline(row.estimates[key].mean, color=colors[row.domain], linestyle=":", linewidth=1)
    if published := PUBLISHED_COLUMNS.get(key):
        for is_moss, whose, marker in ((True, "MOSS", "x"), (False, "other codecs", ".")):
            known = [
                (float(row["bps"]), float(row[published]))
                for row in csv.DictReader(PUBLISHED_FILE.read_text("utf-8").splitlines())
                if row[published] and row["model"].startswith("MOSS") == is_moss
            ]
            label = f"published {published.rsplit('_', 1)[1]}, other data: {whose}"
            axes.plot(*zip(*known, strict=True), marker, color="0.6", label=label, markersize=5, zorder=0)
    axes.set_xlabel("bitrate (bit/s)")
    axes.set_title(f"{column.title} ({'higher' if column.is_higher_better else 'lower'} is better)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return _svg(figure)


def usage_plot(levels: Sequence[CodebookUsage]) -> str:
    """Plot bars per level as SVG: share of codes in use, entropy over its maximum, and the usage expected by chance."""
    figure = new_figure(*PANEL_INCHES)
    axes = figure.subplots()
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
    """Return the rows with a bitrate and a value, by domain, or by domain and system if there are several systems.

    Those of all domains together are left out.
    """
    lines: dict[str, list[SummaryRow]] = {}
    several = len({row.condition.system for row in rows if row.condition.bitrate is not None}) > 1
    for row in rows:
        if row.condition.bitrate is not None and column.key in row.estimates and row.domain != ALL_DOMAINS:
            name = f"{row.domain}, {row.condition.system}" if several else row.domain
            lines.setdefault(name, []).append(row)
    return {name: sorted(points, key=lambda row: row.condition.bitrate or 0) for name, points in lines.items()}


def _svg(figure: "Figure") -> str:
    import matplotlib

    for axes in figure.axes:  # the name of a codec or folder may contain anything, even half a formula
        legend = axes.get_legend()
        for text in (axes.title, *(legend.get_texts() if legend else ())):
            text.set_parse_math(False)
    buffer = io.StringIO()
    # Without salt and date the text is the same in every run.
    with matplotlib.rc_context({"svg.hashsalt": "moss_train", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def write_report(
    folder: Path,
    table: Table,
    rows: Sequence[ClipRow],
    levels: Sequence[CodebookUsage],
    comparisons: Sequence[Comparison],
) -> None:
    """Write `report.html` beside the results and the audio that was kept; it has no plots without matplotlib."""
    without_plots = missing_package("matplotlib")
    plots: dict[str, str | None] = {}
    if without_plots is None:
        others = [(comparison.other, comparison.summary) for comparison in comparisons]
        plots = {column.title: bitrate_plot(column, table.rows, others) for column in table.columns}
        plots["Use of the codebooks"] = usage_plot(levels) if levels else None
    figures = [
        f'<figure class="plot" aria-label="{html.escape(title)}">{plot}</figure>'
        for title, plot in plots.items()
        if plot is not None
    ]
    parts = {
        "title": html.escape(table.title),
        "table": "".join(_tables(table)),
        "footnotes": "".join(f"<li>{html.escape(note)}</li>" for note in table.footnotes),
        "plots": f"<p>{without_plots}</p>" if without_plots else "".join(figures),
        "comparisons": "".join(map(_comparison, comparisons)),
        "clips": "".join(_clips(folder / AUDIO_FOLDER, rows, draw=without_plots is None)),
    }
    template = Template(Path(__file__).with_name("report_template.html").read_text("utf-8"))
    with atomic_write(folder / "report.html") as temporary:
        temporary.write_text(template.substitute(parts), encoding="utf-8")


def _tables(table: Table) -> Iterator[str]:
    """Yield a table per domain, without columns that have no values there; a tooltip shows a value's interval."""
    for domain in dict.fromkeys(row.domain for row in table.rows):
        rows = tuple(row for row in table.rows if row.domain == domain)
        columns = tuple(column for column in table.columns if any(column.key in row.estimates for row in rows))
        (_, system, _, *header), *lines = table_cells(replace(table, rows=rows, columns=columns))
        before = 1 + bool(table.effective_bitrates)
        after = len(header) - before - len(columns)
        body = []
        for (_, _, _, *cells), row in zip(lines, rows, strict=True):
            hints = [_interval(row.estimates.get(column.key), column.decimals) for column in columns]
            hints = [""] * before + hints + [""] * after
            values = "".join(f"<td{hint}>{html.escape(cell)}</td>" for cell, hint in zip(cells, hints, strict=True))
            kind = ' class="anchor"' if row.condition.system in ANCHORS else ""
            body.append(f"<tr{kind}><td>{html.escape(row.condition.label)}</td>{values}</tr>")
        yield f"<h2>{html.escape(domain)}</h2>{_wide([system, *header], body)}"


def _interval(value: ConfidenceInterval | None, decimals: int) -> str:
    if value is None:
        return ""
    return f' title="95 %: {value.low:.{decimals}f} to {value.high:.{decimals}f}, {value.num_clips} clips"'


def _wide(header: Sequence[str], body: Sequence[str]) -> str:
    """A table that scrolls sideways below its first column where the page is narrower."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _comparison(comparison: Comparison) -> str:
    """Return a table: a line per pair of conditions, a column per measure, differences that are sure coloured."""
    titles = list(dict.fromkeys(item.column for item in comparison.differences))
    lines: dict[str, dict[str, Difference]] = {}
    for item in comparison.differences:
        lines.setdefault(f"{item.first.label} − {item.second.label}", {})[item.column] = item
    body = []
    for label, found in lines.items():
        cells = [f"<td>{html.escape(label)}</td>"]
        for title in titles:
            if title not in found:
                cells.append("<td></td>")
                continue
            value, is_higher_better = found[title].estimate, found[title].is_higher_better
            is_better = value.mean > 0 if is_higher_better else value.mean < 0
            kind = ("better" if is_better else "worse") if found[title].is_sure else "open"
            cells.append(f'<td class="{kind}"{_interval(value, 3)}>{value.mean:+.3f}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f"<li>{html.escape(f'{name}: {reason}')}</li>" for name, reason in comparison.skipped.items())
    skipped = f"<p>Not compared:</p><ul>{notes}</ul>" if notes else ""
    legend = f'<p class="notes">Differences over the clips that both have; coloured where {SURE}.</p>'
    return f"<h2>Against {html.escape(comparison.other)}</h2>{_wide(['difference', *titles], body)}{legend}{skipped}"


def _clips(folder: Path, rows: Sequence[ClipRow], draw: bool) -> Iterator[str]:
    """Yield players of every clip whose audio was kept, and spectrograms of original, fewest and most levels."""
    for row in rows:
        depths = [entry.condition for entry in row.conditions if entry.condition.system not in ANCHORS]
        depths.sort(key=lambda condition: (condition.system, condition.num_quantizers or 0))
        paths = [("original", folder / row.key / "original.flac")]
        if not paths[0][1].is_file():
            continue
        paths += [(depth.label, folder / row.key / f"{file_name(depth)}.flac") for depth in depths]
        parts = [f"<h3>{html.escape(f'{row.domain}: {row.clip}')}</h3>"]
        for label, path in paths:
            if path.is_file():
                data = base64.b64encode(path.read_bytes()).decode()
                audio = f'<audio controls preload="metadata" src="data:audio/flac;base64,{data}"></audio>'
                parts.append(f'<div class="player"><span class="name">{html.escape(label)}</span>{audio}</div>')
        if draw:
            shown = dict((*paths[:2], *paths[-1:])).items()
            read = {label: read_audio(path) for label, path in shown if path.is_file()}
            rate = read["original"][1]
            same = {label: audio for label, (audio, own) in read.items() if own == rate and audio.shape[-1] > 1}
            if len(same) > 1:
                buffer = io.BytesIO()
                save_spectrograms(same, rate, buffer)
                data = base64.b64encode(buffer.getvalue()).decode()
                parts.append(f'<img class="spectrogram" alt="Spectrograms" src="data:image/png;base64,{data}">')
        yield f'<section class="clip" data-clip="{html.escape(row.clip)}">{"".join(parts)}</section>'
