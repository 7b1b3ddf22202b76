"""Reconstruct clips with a model at several numbers of levels: writes small Opus files, spectrograms and a table.

    python recipes/cat_mini/listen.py recipes/cat_mini heldout.jsonl OUT --clips ID ID --levels 1 4 16

The originals are not copied: the table names their files.
"""

import argparse
import json
from pathlib import Path

import soundfile
import torch
from PIL import Image

from moss_train.audio.io import read_audio
from moss_train.export import load_tokenizer
from moss_train.plotting import save_spectrograms

PEAK = 0.7  # the peak level that the model was trained at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="run, checkpoint or model folder")
    parser.add_argument("manifest", type=Path, help="JSON lines with id, path and text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", nargs="+", required=True, help="ids of the clips")
    parser.add_argument("--levels", nargs="+", type=int, default=[1, 4, 16])
    arguments = parser.parse_args()
    model = load_tokenizer(arguments.model).eval()
    entries = {entry["id"]: entry for entry in map(json.loads, arguments.manifest.read_text("utf-8").splitlines())}
    arguments.out.mkdir(parents=True, exist_ok=True)
    header = " | ".join(map(count, arguments.levels))
    lines = [f"| clip | text | {header} | spectrograms |", "|---" * (3 + len(arguments.levels)) + "|"]
    for clip_id in arguments.clips:
        entry = entries[clip_id]
        path = arguments.manifest.parent / entry["path"]
        audio = read_audio(path, sampling_rate=model.sampling_rate, num_channels=1)[0]
        outputs = {"original": audio * (PEAK / audio.abs().max())}
        with torch.inference_mode():
            codes = model.encode(outputs["original"][None], return_dict=True).audio_codes
            for levels in arguments.levels:
                decoded = model.decode(codes[:levels], return_dict=True).audio[0]
                outputs[count(levels)] = decoded[:, : audio.shape[1]]
        links = []
        for levels in arguments.levels:
            name = f"{clip_id}.levels-{levels:02d}.opus"
            samples = outputs[count(levels)].clamp(-1, 1).T.numpy()
            soundfile.write(arguments.out / name, samples, model.sampling_rate, format="OGG", subtype="OPUS")
            links.append(f"[listen]({name})")
        picture = f"{clip_id}.png"
        save_spectrograms(outputs, model.sampling_rate, arguments.out / picture, title=clip_id)
        shrink(arguments.out / picture)
        lines.append(f"| `{clip_id}` | {entry['text']} | {' | '.join(links)} | [picture]({picture}) |")
    table = "\n".join(lines)
    (arguments.out / "table.md").write_text(table + "\n", "utf-8")
    print(table)


def shrink(picture: Path) -> None:
    """Store a picture with fewer pixels and 64 colours, in a tenth of the bytes."""
    with Image.open(picture) as image:
        small = image.convert("RGB").resize((image.width * 3 // 5, image.height * 3 // 5))
    small.quantize(64).save(picture, optimize=True)


def count(levels: int) -> str:
    """Return the number of levels in words."""
    return f"{levels} level{'s' * (levels > 1)}"


if __name__ == "__main__":
    main()
