"""`encode`: turn audio files or packed shards into codes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moss_train.config.schema import EncodeConfig
from moss_train.export.load import load_tokenizer
from moss_train.inference.batching import choose_device, use_precision
from moss_train.inference.encode import Encoder, chunk_seconds, encode_files
from moss_train.inference.files import find_audio, print_report
from moss_train.inference.shards import EncodeJob, encode_shards

SUMMARY = "Turn audio files into codes, one .safetensors or .npz file per clip, or packed shards into shards of codes."
EXAMPLES = (
    "python -m moss_train encode model=my-tokenizer input=/my/audio out=/my/codes",
    "python -m moss_train encode model=runs/x input=clips.jsonl out=codes num_quantizers=8",
    "python -m moss_train encode model=my-tokenizer shards=/shards/speech out=/codes/speech 'device=[cuda:0,cuda:1]'",
)


def run(config: EncodeConfig | Mapping[str, Any]) -> int:
    """Encode a corpus; the exit status is 1 when some clips could not be read."""
    config = EncodeConfig.of(config)
    batch_seconds = config.batch_seconds
    out = Path(config.out).expanduser()
    if config.shards is not None:
        return _run_shards(config, batch_seconds, out)
    found = find_audio(config.input or [], out, f".{config.format}")
    device = choose_device(config.device[0])
    model = load_tokenizer(config.model).to(device)  # type: ignore[arg-type]
    use_precision(model, config.precision, device)
    chunk_duration = chunk_seconds(model, config.streaming, config.chunk_duration)
    name, levels = str(config.model), config.num_quantizers
    encoder = Encoder(model, name, levels, chunk_duration, config.batch_invariant, config.loudness)
    return print_report(encode_files(encoder, found.works, batch_seconds, found.failures), out, "encode")


def _run_shards(config: EncodeConfig, batch_seconds: float, out: Path) -> int:
    devices = [choose_device(name) for name in config.device]
    audio = Path(config.shards or "").expanduser()
    job = EncodeJob(
        str(config.model),
        audio,
        config.num_quantizers,
        config.chunk_duration,
        batch_seconds,
        config.streaming,
        config.batch_invariant,
        config.precision,
        config.loudness,
    )
    return print_report(encode_shards(job, out, devices, executor=config.executor), out, "encode", "shard")
