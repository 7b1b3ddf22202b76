"""Write the manifest of one part of AudioSet (research.google.com/audioset, lists CC BY 4.0; audio from YouTube).

    python recipes/audioset/prepare.py eval_segments.csv class_labels_indices.csv data/audioset/eval eval.jsonl

The lists are the published ones. The audio must already be there: one file per segment, named after the YouTube id,
with or without a leading `Y` and a trailing start time in seconds (`Y--4gqARaEJE.wav`, `--4gqARaEJE_0.000.flac`).
Segments without a file are counted. The text of a clip is a caption made from its class names.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from moss_train.data.pack.list_formats import write_manifest
from moss_train.data.pack.manifest import AUDIO_SUFFIXES


def main(segments: Path, labels: Path, audio: Path, manifest: Path) -> None:
    """Write the manifest and print how many segments have no file."""
    files = {path.stem: path.resolve() for path in sorted(audio.rglob("*")) if path.suffix.lower() in AUDIO_SUFFIXES}
    found = list(clips(read_segments(segments), read_names(labels), files))
    count = write_manifest(manifest, (clip for clip in found if clip))
    print(f"{manifest}: {count} clips, {found.count(None)} segments without a file in {audio}")


def read_segments(path: Path) -> Iterator[tuple[str, float, list[str]]]:
    """Yield the YouTube id, the start in seconds and the class ids of every line that is not a comment."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = (line for line in file if not line.startswith("#"))
        for name, start, _, classes in csv.reader(lines, skipinitialspace=True):
            yield name, float(start), classes.split(",")


def read_names(path: Path) -> dict[str, str]:
    """Return the class names by class id."""
    with path.open(encoding="utf-8", newline="") as file:
        return {row["mid"]: row["display_name"] for row in csv.DictReader(file)}


def clips(segments: Iterator, names: dict[str, str], files: dict[str, Path]) -> Iterator[dict | None]:
    """Yield an entry for every segment, or None for a segment without a file."""
    for name, start, classes in segments:
        stems = (name, f"Y{name}", f"{name}_{start:.3f}", f"{name}_{int(start)}", f"{name}_{int(start * 1000)}")
        path = next((files[stem] for stem in stems if stem in files), None)
        text = ", ".join(names.get(label, label) for label in classes)
        entry = {"path": str(path), "id": name, "domain": "sound", "task": "caption", "text": text}
        yield entry if path else None


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
