"""`decode`: turn codes into audio files."""

from pathlib import Path

from moss_train.config.schema import DecodeConfig
from moss_train.data.shards.codes import is_code_folder
from moss_train.inference.batching import choose_device, load_model
from moss_train.inference.decode import Decoder, decode_files
from moss_train.inference.files import find_codes, print_report
from moss_train.inference.shards import decode_shards

SUMMARY = "Turn codes back into audio files."
EXAMPLES = (
    "python -m moss_train decode model=my-tokenizer input=/my/codes out=/my/decoded",
    "python -m moss_train decode model=runs/x input=codes out=decoded format=flac num_quantizers=4",
)


def run(config: DecodeConfig) -> int:
    """Decode a folder of codes; the exit status is 1 when some files could not be used."""
    batch_seconds = config.batch_seconds
    out = Path(config.out)
    inputs, suffix = config.input, f".{config.format}"
    shards = len(inputs) == 1 and is_code_folder(Path(inputs[0]))
    works = [] if shards else find_codes(inputs, out, suffix)
    model, chunk_duration = load_model(config, choose_device(config.device))
    decoder = Decoder(model, config.num_quantizers, chunk_duration, config.batch_invariant)
    if shards:
        report = decode_shards(decoder, Path(inputs[0]), out, suffix, batch_seconds)
        return print_report(report, out, "decode")
    return print_report(decode_files(decoder, works, batch_seconds), out, "decode")
