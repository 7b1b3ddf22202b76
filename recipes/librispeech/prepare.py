"""Write the manifests of LibriSpeech (openslr.org/12, CC BY 4.0): one per subset, text in lower case.

    python recipes/librispeech/prepare.py data/LibriSpeech data/manifests/librispeech

The first argument is the folder with the subsets (`test-clean/1089/134686/1089-134686-0000.flac`).
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from moss_train.data.pack.list_formats import write_manifest


def clips(subset: Path) -> Iterator[dict]:
    """Yield every utterance of a subset, in the order of the transcripts."""
    for listing in sorted(subset.glob("*/*/*.trans.txt")):
        for line in listing.read_text("utf-8").splitlines():
            name, _, text = line.partition(" ")
            labels = {"domain": "speech", "language": "en", "speaker": f"librispeech-{name.partition('-')[0]}"}
            path = listing.with_name(f"{name}.flac")
            yield {"path": str(path.resolve()), "id": f"{subset.name}/{name}", "text": text.lower()} | labels


def main(root: Path, out: Path) -> None:
    """Write one manifest for every subset found."""
    subsets = [folder for folder in sorted(root.iterdir()) if any(folder.glob("*/*/*.trans.txt"))]
    if not subsets:
        sys.exit(f"{root} has no subset of LibriSpeech; give the folder that holds test-clean and the others")
    for subset in subsets:
        path = out / f"{subset.name}.jsonl"
        print(f"{path}: {write_manifest(path, clips(subset))} clips")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
