"""Write the manifests of MUSDB18-HQ (zenodo.org/records/3338373, for research only): mixtures, whole and in chunks.

    python recipes/musdb/prepare.py data/musdb18hq data/manifests/musdb

The first argument is a folder with `train/<track>/mixture.wav` and `test/<track>/mixture.wav`. The training manifest
lists whole tracks, which `pack` cuts. The evaluation manifest lists the test part in chunks of 5 s, without the
incomplete chunk at the end of each track.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from moss_train.audio.io import audio_info
from moss_train.data.pack.list_formats import write_manifest

CHUNK_SECONDS = 5


def tracks(folder: Path) -> list[Path]:
    """Return the mixtures of a part in order, or exit with a message if there are none."""
    found = sorted(folder.glob("*/mixture.wav"))
    if not found:
        sys.exit(f"{folder} has no <track>/mixture.wav; give the folder of MUSDB18-HQ that holds train and test")
    return found


def whole(folder: Path) -> Iterator[dict]:
    """Yield a clip per track."""
    for path in tracks(folder):
        yield {"path": str(path.resolve()), "id": path.parent.name, "domain": "music"}


def chunks(folder: Path) -> Iterator[dict]:
    """Yield the chunks of every track."""
    for path in tracks(folder):
        for start in range(0, int(audio_info(path).seconds) // CHUNK_SECONDS * CHUNK_SECONDS, CHUNK_SECONDS):
            times = {"start_seconds": start, "end_seconds": start + CHUNK_SECONDS}
            yield {"path": str(path.resolve()), "id": f"{path.parent.name}@{start}", "domain": "music"} | times


def main(root: Path, out: Path) -> None:
    """Write both manifests."""
    print(f"{out / 'train.jsonl'}: {write_manifest(out / 'train.jsonl', whole(root / 'train'))} tracks")
    print(f"{out / 'test.jsonl'}: {write_manifest(out / 'test.jsonl', chunks(root / 'test'))} chunks")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
