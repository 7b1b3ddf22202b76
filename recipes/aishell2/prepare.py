"""Write the manifest of one part of AISHELL-2 (aishelltech.com/aishell_2, on application, for research only).

    python recipes/aishell2/prepare.py data/AISHELL-2/iOS/data data/manifests/aishell2/train.jsonl
    python recipes/aishell2/prepare.py data/AISHELL-DEV-TEST-SET/iOS/test data/manifests/aishell2/test.jsonl

A part is a folder with `wav.scp`, `trans.txt` and `wav/C0001/IC0001W0001.wav`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from moss_train.data.pack.list_formats import iterate_utterances, write_manifest


def clips(folder: Path) -> Iterator[dict]:
    """Yield every utterance, also those without a file, which `pack` counts. A recording's folder names its speaker."""
    for _, entry in iterate_utterances(folder):
        path = folder.resolve() / entry["path"]
        labels = {"domain": "speech", "language": "zh", "speaker": f"aishell2-{path.parent.name}"}
        yield {"path": str(path), "id": entry["id"], "text": entry.get("text")} | labels


if __name__ == "__main__":
    manifest = Path(sys.argv[2])
    print(f"{manifest}: {write_manifest(manifest, clips(Path(sys.argv[1])))} clips")
