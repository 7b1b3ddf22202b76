"""Measure time and memory of encode and decode, offline and streaming, also against another implementation.

    python tools/bench_inference.py --model FOLDER                    # a released or exported folder
    python tools/bench_inference.py --experiment cat_nano             # random weights of a configuration
    python tools/bench_inference.py --reference FOLDER                # also time the folder's own remote code

The two models alternate. The results are the median of `--repeats` runs and the median of their ratios, so that other
load on the machine affects both alike; on a shared machine, `--clock cpu --threads 1` measures processor time instead.
Memory on a CPU is the growth of the process; memory that the allocator kept from an earlier case is not included.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from moss_train import load_config
from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Case = tuple[str, int, float, int]  # task, batch size, seconds, frames per chunk (0: offline)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder with config.json and weights")
    source.add_argument("--experiment", help="configuration to build with random weights")
    source.add_argument("--reference", help="folder with weights and remote code to compare with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of all threads, only for a CPU")
    parser.add_argument("--tasks", choices=("encode", "decode"), nargs="*", default=["encode", "decode"])
    parser.add_argument("--offline-seconds", type=float, nargs="*", default=[1, 10, 30, 120])
    parser.add_argument("--offline-batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--chunk-frames", type=int, nargs="*", default=[1, 4, 25])
    parser.add_argument("--stream-batch", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--stream-seconds", type=float, default=20.0, help="length of a streamed clip")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    if options.clock == "cpu" and options.device != "cpu":
        parser.error("--clock cpu needs --device cpu: work on an accelerator takes no processor time")
    return options


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Return the models to compare by name, ours first."""
    dtype = DTYPES[options.dtype]
    if options.experiment:
        settings = load_config("fit", [f"experiment={options.experiment}"]).tokenizer.to_plain()
        torch.manual_seed(0)
        with torch.device(options.device):  # initializing a large model on a CPU is slow
            models: dict[str, Any] = {"ours": MossAudioTokenizerModel(MossAudioTokenizerConfig.from_stages(**settings))}
    else:
        models = {"ours": MossAudioTokenizerModel.from_pretrained(options.model or options.reference, dtype=dtype)}
    if options.reference:
        models["reference"] = AutoModel.from_pretrained(options.reference, trust_remote_code=True, dtype=dtype)
    return {name: model.to(options.device, dtype).eval() for name, model in models.items()}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for task in options.tasks:
        for batch in options.offline_batch:
            for seconds in options.offline_seconds:
                yield task, batch, seconds, 0
        for batch in options.stream_batch:
            for frames in options.chunk_frames:
                yield task, batch, options.stream_seconds, frames


def prepare(model: Any, config: MossAudioTokenizerConfig, case: Case, is_alone: bool) -> Callable[[], Any]:
    """Return the call to measure. Chunks use `stream`, or beside another model `chunk_duration`, which both have."""
    task, batch, seconds, chunk = case
    generator = torch.Generator().manual_seed(0)
    frames = max(1, round(seconds * config.frame_rate))
    options = {"chunk_duration": chunk / config.frame_rate} if chunk else {}
    if task == "encode":
        shape = (batch, config.number_channels, frames * config.downsample_rate)
        whole = (torch.randn(shape, generator=generator) * 0.1).to(model.device)
    else:
        shape = (config.num_quantizers, batch, frames)
        size = config.quantizer_kwargs["codebook_size"]
        whole = torch.randint(0, size, shape, generator=generator).to(model.device)
    if chunk and is_alone:
        stream = model.stream(batch, chunk_frames=chunk)
        step = chunk * config.downsample_rate if task == "encode" else chunk
        return lambda: streamed(stream, getattr(stream, task), whole.split(step, dim=2))
    return lambda: getattr(model, task)(whole, return_dict=True, **options)


def streamed(stream: Any, call: Callable[[torch.Tensor], Any], chunks: Sequence[torch.Tensor]) -> None:
    """Run a stream over all chunks; each result is read before the next chunk is sent."""
    stream.reset()
    for chunk in chunks:
        result, _ = call(chunk)
        result[..., -1:].cpu()


def measure(call: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds that a call takes and the MiB of memory that it adds at its peak (NaN if unknown)."""
    gc.collect()
    before = reset_peak(device)
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - start
    return seconds, (peak(device) - before) / 2**20


def reset_peak(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return process_status("VmRSS")
    except OSError:
        return float("nan")


def peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else process_status("VmHWM")


def process_status(name: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def run(models: dict[str, Any], case: Case, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Return one row: median time and memory of every model; for a case that a model refuses, the reason instead."""
    config = models["ours"].config
    row: dict[str, Any] = dict(zip(("task", "batch", "seconds", "chunk_frames"), case, strict=True))
    calls = {name: prepare(model, config, case, len(models) == 1) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):  # the first repeat is the warm-up
        for name, call in list(calls.items()):
            try:
                seconds, memory = measure(call, models[name].device, clock)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                row[f"{name}_refused"] = str(error).splitlines()[0]
                del calls[name], times[name]
                continue
            row[f"{name}_mib"] = round(max(memory, row.get(f"{name}_mib", memory)), 1)
            if repeat > 0:
                times[name].append(seconds)
    row |= {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
    if len(times) == 2:
        quotients = [theirs / ours for ours, theirs in zip(times["ours"], times["reference"], strict=True)]
        row["times_as_fast"] = statistics.median(quotients)
    return row


def table_line(row: dict[str, Any]) -> str:
    mode = f"chunks of {row['chunk_frames']}" if row["chunk_frames"] else "offline"
    parts = [f"{row['task']:6} batch {row['batch']:2} {row['seconds']:6g} s {mode:13}"]
    for name in ("ours", "reference"):
        if f"{name}_seconds" in row:
            seconds = row[f"{name}_seconds"]
            speed = row["batch"] * row["seconds"] / seconds
            parts.append(f"{name} {seconds * 1e3:9.1f} ms {speed:8.1f} x real time {row[f'{name}_mib']:8.1f} MiB")
        elif f"{name}_refused" in row:
            parts.append(f"{name} refuses: {row[f'{name}_refused']}")
    if "times_as_fast" in row:
        parts.append(f"{row['times_as_fast']:.2f} times as fast")
    return " | ".join(parts)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    models = load(options)
    parameters = sum(parameter.numel() for parameter in models["ours"].parameters())
    print(
        f"{parameters:,} parameters, {options.dtype}, {options.device}, {options.threads} threads, {torch.__version__}"
    )
    rows = []
    for case in cases(options):
        rows.append(run(models, case, options.repeats, CLOCKS[options.clock]))
        print(table_line(rows[-1]), flush=True)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
