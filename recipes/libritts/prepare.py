"""Write the manifests of LibriTTS (openslr.org/60, CC BY 4.0): one per subset, with the normalized texts.

    python recipes/libritts/prepare.py data/LibriTTS data/manifests/libritts

The first argument is the folder with the subsets (`dev-clean/84/121123/84_121123_000007_000001.wav`).
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from moss_train.data.pack.list_formats import write_manifest


def clips(subset: Path) -> Iterator[dict]:
    """Yield every utterance of a subset; some have no text."""
    for path in sorted(subset.glob("*/*/*.wav")):
        text = path.with_suffix(".normalized.txt")
        labels = {"domain": "speech", "language": "en", "speaker": f"libritts-{path.stem.partition('_')[0]}"}
        labels["text"] = text.read_text("utf-8").strip() if text.is_file() else None
        yield {"path": str(path.resolve()), "id": f"{subset.name}/{path.stem}"} | labels


def main(root: Path, out: Path) -> None:
    """Write one manifest for every subset found."""
    subsets = [folder for folder in sorted(root.iterdir()) if next(folder.glob("*/*/*.wav"), None)]
    if not subsets:
        sys.exit(f"{root} has no subset of LibriTTS; give the folder that holds dev-clean and the others")
    for subset in subsets:
        path = out / f"{subset.name}.jsonl"
        print(f"{path}: {write_manifest(path, clips(subset))} clips")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
