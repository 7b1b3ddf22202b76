"""Manifests of three voices in the public domain (CC0): train.jsonl and heldout.jsonl, with texts.

    python recipes/cc0_voices/prepare.py CLONES OUT

CLONES holds `dataset-voice-kathleen`, `dataset-voice-kerstin` and `dataset-voice-nathalie` as they are on GitHub. The
clips that heldout.txt names are held out, and so is every other recording of their texts.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moss_train.data.pack.list_formats import write_manifest

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Voice:
    """Where a repository keeps its recordings.

    Attributes:
        num_clips: recordings that the manifests must have at least, or the clone is incomplete.
    """

    name: str
    language: str
    pattern: str
    num_clips: int


VOICES = (
    Voice("kathleen", "en", "data/*.wav", 1593),
    Voice("kerstin", "de", "verified/*.flac", 1359),
    Voice("nathalie", "nl", "verified/*.flac", 1115),
)


def texts_of(checkout: Path, voice: Voice) -> dict[str, str]:
    """Read the texts by file name without suffix: from metadata.csv (`name|text`), or from .txt beside the audio."""
    table = checkout / "metadata.csv"
    if table.exists():
        rows = (line.split("|") for line in table.read_text("utf-8").splitlines() if "|" in line)
        return {row[0].strip(): row[-1].strip() for row in rows}
    return {
        path.stem: path.read_text("utf-8").strip() for path in checkout.glob(str(Path(voice.pattern).parent / "*.txt"))
    }


def clips(checkout: Path, voice: Voice) -> Iterator[dict]:
    """Yield every recording that has a text."""
    texts = texts_of(checkout, voice)
    for path in sorted(checkout.glob(voice.pattern)):
        if text := texts.get(path.stem):
            labels = {"domain": "speech", "language": voice.language, "speaker": voice.name, "task": "asr"}
            yield {"id": f"{voice.name}_{path.stem}", "path": str(path.resolve()), "text": text} | labels


def main(clones: Path, out: Path) -> None:
    """Write both manifests, or end with a reason."""
    heldout_ids = set((HERE / "heldout.txt").read_text("utf-8").split())
    found: list[dict] = []
    for voice in VOICES:
        checkout = clones / f"dataset-voice-{voice.name}"
        recordings = list(clips(checkout, voice))
        if len(recordings) < voice.num_clips:
            sys.exit(
                f"{checkout} has {len(recordings)} recordings with a text instead of {voice.num_clips}; "
                f"remove {checkout / '.complete'} and try again"
            )
        found += recordings
    missing = heldout_ids - {clip["id"] for clip in found}
    if missing:
        sys.exit(f"{len(missing)} held-out clips are not there, such as {min(missing)}")
    heldout = [clip for clip in found if clip["id"] in heldout_ids]
    unseen = {(clip["speaker"], clip["text"]) for clip in heldout}
    train = [clip for clip in found if (clip["speaker"], clip["text"]) not in unseen]
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("heldout", heldout)):
        path = out / f"{name}.jsonl"
        print(f"{path}: {write_manifest(path, iter(part))} clips")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
