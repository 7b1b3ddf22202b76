"""Copy a manifest's clips at another speed: more pitches and tempos, so that a model overfits less to a few voices.

    python recipes/cc0_voices/speed_copies.py data/cc0_voices/train.jsonl data/cc0_voices/speed90 0.9

Writes FLAC at 24 kHz with a peak of 0.7, and a manifest beside the folder (data/cc0_voices/speed90.jsonl). Its clips
have the folder's name as their domain, and no text.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from moss_train.audio.io import read_audio, resample, write_audio
from moss_train.data.pack.list_formats import write_manifest

SAMPLING_RATE = 24000
PEAK = 0.7


def copy_clip(entry: dict, source: Path, out: Path, speed: float) -> dict:
    """Write one clip at another speed and return its manifest line."""
    torch.set_num_threads(1)
    audio, rate = read_audio(source / entry["path"], num_channels=1)
    audio = resample(audio, round(rate * speed), SAMPLING_RATE)
    path = out / f"{entry['id']}.flac"
    write_audio(path, audio * (PEAK / audio.abs().max()), SAMPLING_RATE)
    labels = {key: entry[key] for key in ("language", "speaker") if key in entry}
    return {"id": f"{entry['id']}_{out.name}", "path": str(path.resolve()), "domain": out.name, **labels}


def main(manifest: Path, out: Path, speed: float) -> None:
    """Copy every clip of the manifest."""
    out.mkdir(parents=True, exist_ok=True)
    entries = [json.loads(line) for line in manifest.read_text("utf-8").splitlines()]
    with ProcessPoolExecutor() as pool:
        copied = pool.map(partial(copy_clip, source=manifest.parent, out=out, speed=speed), entries, chunksize=20)
        print(f"{out}.jsonl: {write_manifest(out.with_suffix('.jsonl'), copied)} clips")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
