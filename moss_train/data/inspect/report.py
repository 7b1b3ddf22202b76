"""Write the HTML page of a data report; it needs only the files beside it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from moss_train.data.inspect.measure import ClipFacts, Inspection, summarize
from moss_train.utils.files import pluralize

_MOST_ROWS = 200

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0 } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100% }
tr { border-bottom: 1px solid #eee } .bad { color: #b00 } .tables { display: flex; gap: 3rem; flex-wrap: wrap }
.text { max-width: 40rem } audio { height: 2rem }
"""


def render_page(
    inspections: Sequence[Inspection],
    bad: Mapping[str, str],
    players: Sequence[tuple[str, ClipFacts, str]],
    figure: str,
) -> str:
    """Return the page. `players` are (audio file, clip, text); `figure` is the name of the PNG."""
    clips = [clip for inspection in inspections for clip in inspection.clips]
    hours = sum(clip.seconds for clip in clips) / 3600
    folders = ", ".join(str(inspection.index.folder) for inspection in inspections)
    num_shards = sum(len(inspection.index.shards) for inspection in inspections)
    parts = [
        f"<h1>{escape(folders)}</h1>",
        f"<p>{pluralize(len(clips), 'clip')}, {hours:.2f} hours, {pluralize(num_shards, 'shard')}</p>",
        _problems(inspections),
        '<div class="tables">' + "".join(_hours(kind, table) for kind, table in summarize(clips).items()) + "</div>",
        f'<h2>Distributions</h2><img src="{escape(figure)}" alt="histograms">',
        _bad(clips, bad),
        "<h2>Ten clips</h2>",
        _players(players),
    ]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{escape(folders)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"


def _problems(inspections: Sequence[Inspection]) -> str:
    problems = [problem for inspection in inspections for problem in inspection.problems]
    if not problems:
        return "<p>Every shard has the size and the hash that its index says.</p>"
    return "".join(f'<p class="bad">{escape(problem)}</p>' for problem in problems)


def _hours(kind: str, table: Mapping[str, float]) -> str:
    rows = "".join(f'<tr><td>{escape(name)}<td class="number">{hours:.3f}' for name, hours in table.items())
    return f"<div><h2>Hours by {kind}</h2><table>{rows}</table></div>"


def _bad(clips: Sequence[ClipFacts], bad: Mapping[str, str]) -> str:
    kinds = Counter(reason.partition(":")[0].partition(" of ")[0] for reason in bad.values())
    abrupt = sum(clip.ends_abruptly for clip in clips)
    lines = [f"<tr><td>{escape(kind)}<td class=number>{count}" for kind, count in kinds.most_common()]
    lines.append(f"<tr><td>end abruptly, maybe cut off (not dropped)<td class=number>{abrupt}")
    rows = [f"<tr><td>{escape(name)}<td>{escape(reason)}" for name, reason in list(bad.items())[:_MOST_ROWS]]
    more = f"<p>and {len(bad) - _MOST_ROWS} more in drop.jsonl</p>" if len(bad) > _MOST_ROWS else ""
    which = f"<details><summary>which</summary><table>{''.join(rows)}</table>{more}</details>" if bad else ""
    return f"<h2>To drop: {pluralize(len(bad), 'clip')} (drop.jsonl)</h2><table>{''.join(lines)}</table>{which}"


def _players(players: Sequence[tuple[str, ClipFacts, str]]) -> str:
    rows = []
    for file, clip, text in players:
        facts = f"{clip.seconds:.2f} s, {clip.loudness_lufs:.1f} LUFS, to {clip.bandwidth_hz / 1000:.1f} kHz"
        rows.append(
            f'<tr><td><audio controls preload="none" src="{escape(file)}"></audio><td>{escape(clip.domain)}'
            f'<td>{escape(clip.id)}<br><small>{facts}</small><td class="text">{escape(text)}'
        )
    return f"<table>{''.join(rows)}</table>"
