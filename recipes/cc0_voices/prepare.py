"""Write the manifests of three public-domain (CC0) voices: train.jsonl and heldout.jsonl, with texts.

    python recipes/cc0_voices/prepare.py CLONES OUT

CLONES holds clones of `dataset-voice-kathleen`, `dataset-voice-kerstin` and `dataset-voice-nathalie` from GitHub. The
clips listed in heldout.txt are held out, and so is every other recording of the same texts.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moss_train.data.pack.list_formats import write_manifest

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Voice:
    """Layout of the repository of one voice.

    Attributes:
        num_clips: smallest number of recordings that a complete clone has in the manifests.
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
    """Return the texts by file name without suffix, from metadata.csv (`name|text`) or .txt files beside the audio."""
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
    """Write both manifests, or exit with an error message."""
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
