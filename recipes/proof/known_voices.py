"""Keep the text of a held-out clip only if its voice is in the training set.

Trained on a few hours, no LM learns to transcribe a new voice. Writes `heldout_known.jsonl` beside both manifests, in
which clips of new voices, music and sounds have no text.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def main() -> None:
    """Write the manifest and print how many texts are left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with train.jsonl and heldout.jsonl")
    folder = parser.parse_args().folder
    train, heldout = (read_manifest(folder / f"{part}.jsonl") for part in ("train", "heldout"))
    kept = with_known_voices(train, heldout)
    (folder / "heldout_known.jsonl").write_text("".join(json.dumps(clip) + "\n" for clip in kept), encoding="utf-8")
    before, after = (sum(bool(clip.get("text")) for clip in clips) for clips in (heldout, kept))
    print(f"{len(kept)} clips, {after} of {before} texts are of voices in training")


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a manifest."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def with_known_voices(
    train: Sequence[Mapping[str, Any]], heldout: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return the held-out clips, without text and task where the speaker has no text in training."""
    known = {clip["speaker"] for clip in train if clip.get("text") and clip.get("speaker")}
    unread = {"text": None, "task": None}
    return [clip if clip.get("speaker") in known else {**clip, **unread} for clip in heldout]


if __name__ == "__main__":
    main()
