"""Manifests to train on all of it: every clip without text, to be cropped; texts again; a few clips to validate.

    python recipes/debian_audio/mixture.py data/debian_audio

Writes plain.jsonl (domains speech, music, sound), text.jsonl (domains transcribed, captioned) and validation.jsonl
beside train.jsonl and heldout.jsonl, which run.sh made.
"""

import hashlib
import json
import sys
from pathlib import Path

from moss_train.data.pack.list_formats import write_manifest

VALIDATION_CLIPS_PER_DOMAIN = 20


def read_manifest(path: Path) -> list[dict]:
    """Read the lines of a manifest."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def without_text(clip: dict) -> dict:
    """Return the clip without its text, so that training crops it."""
    return {key: value for key, value in clip.items() if key != "text"}


def with_text(clip: dict) -> dict:
    """Return the clip in a domain of its own, whose share can be chosen, with the task that its domain implied."""
    is_speech = clip["domain"] == "speech"
    return clip | {"domain": "transcribed" if is_speech else "captioned", "task": "asr" if is_speech else "caption"}


def choose_by_hash(clips: list[dict], count: int) -> list[dict]:
    """Choose clips by the hash of their ids: any order of the manifest gives the same ones."""
    return sorted(clips, key=lambda clip: hashlib.sha256(clip["id"].encode()).hexdigest())[:count]


def main(folder: Path) -> None:
    """Write the three manifests."""
    clips = read_manifest(folder / "train.jsonl")
    heldout = read_manifest(folder / "heldout.jsonl")
    domains = ("speech", "music", "sound")
    validation = [
        clip
        for domain in domains
        for clip in choose_by_hash([c for c in heldout if c["domain"] == domain], VALIDATION_CLIPS_PER_DOMAIN)
    ]
    for name, entries in {
        "plain": [without_text(clip) for clip in clips],
        "text": [with_text(clip) for clip in clips if clip.get("text")],
        "validation": validation,
    }.items():
        print(f"{folder / name}.jsonl: {write_manifest(folder / f'{name}.jsonl', entries)} clips")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
