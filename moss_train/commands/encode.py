"""`encode`: turn audio files or packed shards into codes."""

from pathlib import Path

from moss_train.audio.io import audio_info
from moss_train.config.schema import EncodeConfig
from moss_train.inference.batching import choose_device
from moss_train.inference.encode import encode_files
from moss_train.inference.files import Report, find_audio, print_report
from moss_train.inference.shards import encode_shards, make_encoder

SUMMARY = "Turn audio files into codes, one .safetensors or .npz file per clip, or packed shards into shards of codes."
EXAMPLES = (
    "python -m moss_train encode model=my-tokenizer input=/my/audio out=/my/codes",
    "python -m moss_train encode model=runs/x input=clips.jsonl out=codes num_quantizers=8",
    "python -m moss_train encode model=my-tokenizer shards=/shards/speech out=/codes/speech 'device=[cuda:0,cuda:1]'",
)


def run(config: EncodeConfig) -> int:
    """Encode a corpus; the exit status is 1 when some clips could not be read."""
    out = Path(config.out)
    if config.shards is not None:
        devices = [choose_device(name) for name in config.device]
        return print_report(encode_shards(config, devices), out, "encode", "shard")
    works, failures = find_audio(config.input or [], out, f".{config.format}")
    unreadable = []
    for work in works:  # up to the first readable one: without any, the model need not be loaded
        if work.target.exists():
            break
        try:
            audio_info(work.source)
            break
        except (ValueError, OSError) as error:
            unreadable.append((work.source, str(error)))
    else:
        return print_report(Report(0, 0, failures + unreadable), out, "encode")
    encoder = make_encoder(config, choose_device(config.device[0]))
    return print_report(encode_files(encoder, works, config.batch_seconds, failures), out, "encode")
