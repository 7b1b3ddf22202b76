"""`encode`: audio files to codes."""

from pathlib import Path
from typing import Any

from moss_train.commands._report import as_list, positive, print_report
from moss_train.export.loading import load_tokenizer
from moss_train.inference.corpus import find_audio
from moss_train.inference.device import choose_device
from moss_train.inference.encoding import Encoder, encode_files

SUMMARY = "Turn audio files into codes, one .safetensors file per clip."
EXAMPLES = (
    "python -m moss_train encode model=my-tokenizer input=/my/audio out=/my/codes",
    "python -m moss_train encode model=runs/x input=clips.jsonl out=codes num_quantizers=8",
)


def run(config: dict[str, Any]) -> int:
    """Encode a corpus; the exit status is 1 when some clips could not be read."""
    batch_seconds = positive(config, "batch_seconds")
    out = Path(config["out"]).expanduser()
    works = find_audio(as_list(config["input"]), out)
    device = choose_device(config["device"])
    model = load_tokenizer(config["model"]).to(device)  # type: ignore[arg-type]
    encoder = Encoder(model, str(config["model"]), config["num_quantizers"], config["chunk_duration"])
    return print_report(encode_files(encoder, works, batch_seconds), out, "encode")
