"""Evaluate a model on the held-out clips of each voice, scaled as in training, and print the table of its model card.

    python recipes/cat_mini/measure.py recipes/cat_mini out/cc0_voices/heldout.jsonl out/cat_mini_measures

A second call continues where the first one stopped. The output folders hold reports with audio. The English voice is
also transcribed with Whisper if faster-whisper and a Whisper model are installed; speaker similarity is measured if
Resemblyzer is installed (see speaker_similarity.py).
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

from moss_train.data.pack.list_formats import write_manifest

PEAK = 0.7  # the peak level that cat_mini was trained at
METRICS = ["stoi", "pesq", "spectral", "pitch", "buzz", "distillmos"]
COLUMNS = {
    "STOI": "stoi",
    "PESQ-NB": "pesq_nb",
    "Mel-Loss": "mel_loss",
    "pitch": "pitch",
    "buzz (dB)": "buzz",
    "DistillMOS": "distillmos",
    "same speaker": "speaker_similarity",
    "WER": "wer_errors",
    "CER": "cer_errors",
}
HERE = Path(__file__).parent


def main() -> None:
    """Evaluate voice by voice and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="run, checkpoint or model folder")
    parser.add_argument("manifest", type=Path, help="JSON lines with id, path, text, language and speaker")
    parser.add_argument("out", type=Path)
    parser.add_argument("--levels", nargs="+", type=int, default=[1, 4, 8, 16])
    arguments = parser.parse_args()
    print("| " + " | ".join(["voice", "levels", "bit/s", *COLUMNS]) + " |\n" + "|---" * (3 + len(COLUMNS)) + "|")
    for speaker, language in split_by_speaker(arguments.manifest, arguments.out).items():
        evaluate(arguments.model, arguments.out, speaker, language, arguments.levels)
        print_rows(arguments.out / f"evaluation-{speaker}" / "table.csv", f"{speaker.capitalize()} ({language})")


def split_by_speaker(manifest: Path, out: Path) -> dict[str, str]:
    """Write one manifest per speaker and return the speakers' languages."""
    rows = defaultdict(list)
    out.mkdir(parents=True, exist_ok=True)
    for entry in map(json.loads, manifest.read_text("utf-8").splitlines()):
        kept = {key: entry[key] for key in ("id", "text", "language", "speaker")}
        path = str((manifest.parent / entry["path"]).resolve())
        rows[entry["speaker"]].append(kept | {"path": path, "domain": "speech", "task": "asr"})
    for speaker, entries in rows.items():
        write_manifest(out / f"{speaker}.jsonl", entries)
    return {speaker: entries[0]["language"] for speaker, entries in rows.items()}


def evaluate(model: str, out: Path, speaker: str, language: str, levels: list[int]) -> None:
    """Run the `evaluate` command, as a user would."""
    metrics = [*METRICS, "recognition"] if language == "en" else METRICS
    environment, plugins = os.environ.copy(), []
    if find_spec("resemblyzer") is not None:
        metrics = [*metrics, "{_target_: speaker_similarity.SpeakerSimilarity}"]
        plugins = ["plugins=[speaker_similarity]"]
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    overrides = [f"model={model}", f"data={out / speaker}.jsonl", f"out={out / f'evaluation-{speaker}'}"]
    overrides += [f"peak={PEAK}", f"num_quantizers=[{','.join(map(str, levels))}]", f"metrics=[{','.join(metrics)}]"]
    command = [sys.executable, "-m", "moss_train", "evaluate", *plugins, *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)


def print_rows(table: Path, voice: str) -> None:
    """Print one line per number of levels, and the anchors (the original resampled, another clip)."""
    with table.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            values = " | ".join(f"{float(row[name]):.3f}" if row.get(name) else "" for name in COLUMNS.values())
            bps = f"{float(row['bps']):,.0f}" if row["bps"] else ""
            print(f"| {voice} | {row['num_quantizers'] or row['system']} | {bps} | {values} |", flush=True)


if __name__ == "__main__":
    main()
