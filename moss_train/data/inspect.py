"""Measure every clip of packed folders, find those that should be dropped, and write the HTML report."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path

from torch import Tensor

from moss_train.audio.io import to_pcm16
from moss_train.audio.loudness import bandwidth, loudness, power_spectrum
from moss_train.config.schema import InspectConfig
from moss_train.data.pack.preprocess import level_db
from moss_train.data.shards.index import ShardIndex
from moss_train.data.stream.sample_reader import ClipReader
from moss_train.utils.errors import SampleError, UserError
from moss_train.utils.files import pluralize
from moss_train.utils.workers import worker_pool

FULL_SCALE = 32766 / 32768


@dataclass(frozen=True)
class ClipFacts:
    """Measurements of one clip; if it could not be read, they have their defaults and `error` says why."""

    row: int  # in its folder's index
    id: str
    domain: str
    seconds: float
    language: str = "none"
    task: str = "none"
    num_characters: int = 0  # of the text
    loudness_lufs: float = -math.inf
    level_db: float = -math.inf
    peak: float = 0.0
    clipped_fraction: float = 0.0  # of samples at full scale
    bandwidth_hz: float = 0.0
    ends_abruptly: bool = False  # only for clips with text: about as loud at the very end as on average
    digest: str = ""  # of the samples
    error: str = ""


@dataclass(frozen=True)
class Inspection:
    """What was found in one packed folder."""

    index: ShardIndex
    problems: tuple[str, ...]  # a message for each file that differs from the index
    clips: tuple[ClipFacts, ...]


def inspect_folder(
    folder: str | Path, num_workers: int, on_clips: Callable[[int], None] = lambda count: None
) -> Inspection:
    """Verify and measure a packed folder. Raises UserError if its index is damaged or a shard missing or truncated."""
    index = ShardIndex.load(folder)
    problems, clips = _problems(index.verify_arrays), []
    with worker_pool(num_workers if num_workers > 1 else 0, "moss_train.data.inspect") as map_ordered:
        shards = ((str(folder), number) for number in range(len(index.shards)))
        for _, (found, facts) in map_ordered(_inspect_shard, shards):
            problems += found
            clips += facts
            on_clips(len(facts))
    return Inspection(index, tuple(problems), tuple(clips))


def _inspect_shard(task: tuple[str, int]) -> tuple[list[str], list[ClipFacts]]:
    folder, number = task
    index = _index(folder)
    rate, domain = index.sampling_rate, index.shards[number].domain
    reader = ClipReader(rate, index.num_channels)
    clips = []
    for row in index.shards.rows_of(number):
        location = index.locate(row)
        seconds = location.num_samples / rate
        clip_id = f"{Path(location.shard).name}@{location.audio_offset}"
        try:
            reader.check_headers(location)
            labels = reader.read_labels(location)
            clip_id = labels["id"]
            audio = reader.read_audio(location, 0, location.num_samples)
        except SampleError as error:
            clips.append(ClipFacts(row, clip_id, domain, seconds, error=str(error)))
            continue
        power = power_spectrum(audio)
        facts = ClipFacts(
            row=row,
            id=clip_id,
            domain=domain,
            seconds=seconds,
            language=labels.get("language", "none"),
            task=labels.get("task", "none"),
            num_characters=len(labels.get("text", "")),
            loudness_lufs=loudness(power, rate),
            level_db=level_db(audio),
            peak=audio.abs().max().item(),
            clipped_fraction=(audio.abs() >= FULL_SCALE).float().mean().item(),
            bandwidth_hz=bandwidth(power, rate),
            ends_abruptly=location.has_text and ends_abruptly(audio, rate),
            digest=hashlib.sha256(to_pcm16(audio).numpy().tobytes()).hexdigest()[:32],
        )
        clips.append(facts)
    return _problems(lambda: index.verify_shard(index.shards[number])), clips


def _problems(verify: Callable[[], None]) -> list[str]:
    try:
        verify()
    except (UserError, OSError) as error:
        return [str(error)]
    return []


_index = lru_cache(maxsize=4)(ShardIndex.load)


def ends_abruptly(audio: Tensor, sampling_rate: int) -> bool:
    """Return whether audio [C, T] is about as loud in its last 5 ms as on average: cut off, rather than faded out."""
    end = audio[:, -max(1, round(0.005 * sampling_rate)) :]
    return level_db(end) > level_db(audio) - 6.0


def find_clips_to_drop(clips: Sequence[ClipFacts], limits: InspectConfig) -> dict[str, str]:
    """Return id -> reason for the clips that should be dropped; of identical recordings the first is kept."""
    bad: dict[str, str] = {}
    seen: dict[str, str] = {}
    for clip in clips:
        if clip.error:
            reason = f"unreadable: {clip.error}"
        elif clip.level_db < limits.silent_db:
            reason = f"silent: {clip.level_db:.1f} dB"
        elif clip.clipped_fraction > limits.clipped_fraction:
            reason = f"clipped: {clip.clipped_fraction:.1%} of the samples"
        elif clip.task != "caption" and clip.num_characters > limits.max_characters_per_second * clip.seconds:
            reason = f"text: {clip.num_characters} characters in {clip.seconds:.2f} s"
        elif clip.digest in seen:
            reason = f"duplicate of {seen[clip.digest]}"
        else:
            seen[clip.digest] = clip.id
            continue
        bad.setdefault(clip.id, reason)
    return bad


def summarize(clips: Sequence[ClipFacts]) -> dict[str, dict[str, float]]:
    """Return the hours by domain, language and task."""
    hours: dict[str, dict[str, float]] = {"domain": {}, "language": {}, "task": {}}
    for clip in clips:
        for kind, sums in hours.items():
            name = getattr(clip, kind)
            sums[name] = sums.get(name, 0.0) + clip.seconds / 3600
    return {kind: dict(sorted(sums.items())) for kind, sums in hours.items()}


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
    """Return the report as HTML. `players` are (audio file, clip, text); `figure` is the file name of the PNG."""
    clips = [clip for inspection in inspections for clip in inspection.clips]
    hours = sum(clip.seconds for clip in clips) / 3600
    folders = escape(", ".join(str(inspection.index.folder) for inspection in inspections))
    num_shards = sum(len(inspection.index.shards) for inspection in inspections)
    problems = "".join(
        f'<p class="bad">{escape(problem)}</p>' for inspection in inspections for problem in inspection.problems
    )
    tables = ""
    for kind, table in summarize(clips).items():
        cells = "".join(f'<tr><td>{escape(name)}<td class="number">{number:.3f}' for name, number in table.items())
        tables += f"<div><h2>Hours by {kind}</h2><table>{cells}</table></div>"

    kinds = Counter(reason.partition(":")[0].partition(" of ")[0] for reason in bad.values())
    counts = "".join(f"<tr><td>{escape(kind)}<td class=number>{count}" for kind, count in kinds.most_common())
    abrupt = sum(clip.ends_abruptly for clip in clips)
    counts += f"<tr><td>end abruptly, maybe cut off (not dropped)<td class=number>{abrupt}"
    which = ""
    if bad:
        shown = list(bad.items())[:_MOST_ROWS]
        rows = "".join(f"<tr><td>{escape(name)}<td>{escape(reason)}" for name, reason in shown)
        more = f"<p>and {len(bad) - _MOST_ROWS} more in drop.jsonl</p>" if len(bad) > _MOST_ROWS else ""
        which = f"<details><summary>which</summary><table>{rows}</table>{more}</details>"

    heard = ""
    for file, clip, text in players:
        facts = f"{clip.seconds:.2f} s, {clip.loudness_lufs:.1f} LUFS, to {clip.bandwidth_hz / 1000:.1f} kHz"
        heard += (
            f'<tr><td><audio controls preload="none" src="{escape(file)}"></audio><td>{escape(clip.domain)}'
            f'<td>{escape(clip.id)}<br><small>{facts}</small><td class="text">{escape(text)}'
        )
    head = f'<meta charset="utf-8"><title>{folders}</title><style>{_STYLE}</style>'
    return f"""<!doctype html><html lang=en><head>{head}</head><body><h1>{folders}</h1>
<p>{pluralize(len(clips), "clip")}, {hours:.2f} hours, {pluralize(num_shards, "shard")}</p>
{problems or "<p>Every shard has the size and the hash that its index says.</p>"}
<div class="tables">{tables}</div>
<h2>Distributions</h2><img src="{escape(figure)}" alt="histograms">
<h2>To drop: {pluralize(len(bad), "clip")} (drop.jsonl)</h2><table>{counts}</table>{which}
<h2>Ten clips</h2>
<table>{heard}</table></body></html>
"""
