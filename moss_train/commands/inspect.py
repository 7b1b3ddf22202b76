"""`inspect`: report what is in packed folders, and which clips should be dropped."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moss_train.audio.io import write_audio
from moss_train.config.schema import InspectConfig
from moss_train.data.inspect import ClipFacts, Inspection, find_clips_to_drop, inspect_folder, render_page
from moss_train.data.stream.corpus import permutation
from moss_train.data.stream.sample_reader import ClipReader
from moss_train.plotting import Histogram, Scatter, save_histograms
from moss_train.utils.errors import UserError
from moss_train.utils.files import pluralize, printable
from moss_train.utils.progress import progress
from moss_train.utils.workers import num_cores

SUMMARY = "Verify packed shards and report what is in them; writes a list of clips to drop."
EXAMPLES = (
    "python -m moss_train inspect shards=/shards/speech out=report",
    "python -m moss_train pack input=/data/speech.jsonl out=/shards/clean drop=report/drop.jsonl",
)

NUM_PLAYERS = 10


def run(config: InspectConfig) -> int:
    """Inspect every folder and write the report; the exit status is 1 when bytes differ from the index."""
    folders, out = config.shards, Path(config.out)
    if (out / "index.json").exists():
        raise UserError(f"out={out} is a folder of shards; give another one for the report")
    out.mkdir(parents=True, exist_ok=True)  # before the clips are read, which can take hours
    num_workers = config.num_workers or num_cores()
    with progress("inspecting") as bar:
        inspections = [inspect_folder(folder, num_workers, bar.advance) for folder in folders]
    clips = [clip for inspection in inspections for clip in inspection.clips]
    bad = find_clips_to_drop(clips, config)
    counts = Counter(clip.id for clip in clips)
    shared = {name for name in bad if counts[name] > 1}  # an id would drop the clips of all folders
    with (out / "drop.jsonl").open("w", encoding="utf-8") as file:
        for name, reason in bad.items():
            if name in shared:
                continue
            file.write(json.dumps({"id": name, "reason": reason}, ensure_ascii=False) + "\n")
    with (out / "clips.jsonl").open("w", encoding="utf-8") as file:
        for inspection in inspections:
            for clip in inspection.clips:
                values = {key: None if value in (np.inf, -np.inf) else value for key, value in vars(clip).items()}
                file.write(json.dumps({"folder": str(inspection.index.folder)} | values, ensure_ascii=False) + "\n")
    save_histograms(_panels(clips), out / "report.png")
    players = _write_players(out, inspections, bad)
    (out / "report.html").write_text(render_page(inspections, bad, players, "report.png"), encoding="utf-8")
    problems = [problem for inspection in inspections for problem in inspection.problems]
    for problem in problems:
        print(printable(problem))
    print(printable(f"inspect: {pluralize(len(clips), 'clip')}, {len(bad)} to drop, see {out / 'report.html'}"))
    if shared:
        names = pluralize(len(shared), "id")
        print(f"{names} of them not in drop.jsonl, because several folders have such clips: inspect each by itself")
    return 1 if problems else 0


def _panels(clips: Sequence[ClipFacts]) -> list[Histogram | Scatter]:
    clips = [clip for clip in clips if not clip.error]
    domains = sorted({clip.domain for clip in clips})

    def by_domain(name: str, clips: Sequence[ClipFacts] = clips) -> dict[str, np.ndarray]:
        return {domain: np.array([getattr(c, name) for c in clips if c.domain == domain]) for domain in domains}

    with_text = [clip for clip in clips if clip.num_characters]
    seconds, characters = by_domain("seconds", with_text), by_domain("num_characters", with_text)
    pairs = {domain: (seconds[domain], characters[domain]) for domain in domains}
    return [
        Histogram("duration (s)", by_domain("seconds"), logarithmic=True),
        Histogram("loudness (LUFS)", by_domain("loudness_lufs")),
        Histogram("peak", by_domain("peak")),
        Histogram("bandwidth (Hz)", by_domain("bandwidth_hz")),
        Histogram("samples at full scale (share)", by_domain("clipped_fraction"), logarithmic=True),
        *([Scatter("duration (s)", "text (characters)", pairs)] if with_text else []),
    ]


def _write_players(
    out: Path, inspections: Sequence[Inspection], bad: dict[str, str]
) -> list[tuple[str, ClipFacts, str]]:
    """Write ten clips of at most 30 s, taking the domains in turn, and return (file, clip, text) of each."""
    turns: dict[str, list[tuple[Inspection, ClipFacts]]] = {}
    for inspection in inspections:
        for clip in inspection.clips:
            if clip.id not in bad:
                turns.setdefault(clip.domain, []).append((inspection, clip))
    shuffled = [[clips[i] for i in permutation(0, domain, count=len(clips))] for domain, clips in sorted(turns.items())]
    rounds = [clips[turn] for turn in range(NUM_PLAYERS) for clips in shuffled if turn < len(clips)]
    players = []
    for number, (inspection, clip) in enumerate(rounds[:NUM_PLAYERS]):
        index = inspection.index
        reader, location = ClipReader(index.sampling_rate, index.num_channels), index.locate(clip.row)
        length = min(location.num_samples, 30 * index.sampling_rate)
        name = f"players/{number}.flac"
        (out / "players").mkdir(exist_ok=True)
        write_audio(out / name, reader.read_audio(location, 0, length), index.sampling_rate)
        players.append((name, clip, reader.read_labels(location).get("text", "")))
    return players
