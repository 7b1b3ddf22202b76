"""Measure speed, utilization and memory of training: the real update of `fit`, on synthetic clips or packed audio.

    python tools/bench_training.py --experiment cat_1b6                        # a GPU: one table, about ten minutes
    python tools/bench_training.py --experiment cat_tiny --micro-batch-seconds 12 --updates 3 --clips 1 1-2   # a CPU
    python tools/bench_training.py --experiment cat_1b6 --shards /shards/speech --stages adversarial
    python tools/bench_training.py --experiment cat_1b6 --profile profile --clips 10 --stages reconstruction

A case is a stage of the experiment, with or without the text LM, on clips of one length or of a range of lengths.
The FLOPs of its first update are counted operation by operation; later updates are timed. MFU is the counted FLOPs per
second divided by `--peak-tflops` (dense bf16 of an H100), counted as for `mfu` in a run's metrics.csv. With activation
checkpointing, the recomputed forward counts too, as in `hfu`. Other keys of `fit` can follow as overrides, for example
tokenizer.output_sampling_rate=48000: clips then have a target at that rate, and shards have to be packed at it.
"""

import argparse
import gc
import json
import platform
import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from moss_train import load_config
from moss_train.audio.io import resample
from moss_train.batch import Batch, UpdateBatch
from moss_train.config.fit_schema import FitConfig
from moss_train.data.stream.loader import make_loader
from moss_train.data.stream.stream import split_by_length
from moss_train.model import MossAudioTokenizerConfig
from moss_train.training.cost.flops import FlopCounter
from moss_train.training.module import CatModule
from moss_train.training.run.fit import open_stream
from moss_train.training.run.optimizations import apply_optimizations
from moss_train.training.run.trainer import build_trainer, choose_accelerator
from moss_train.training.run.warm_start import plan_initialization
from moss_train.utils.errors import UserError

TEXT_TOKENS_PER_SECOND = 14  # bytes of English read aloud
H100_PEAK_TFLOPS = 989.0


@dataclass(frozen=True)
class Case:
    """What is measured: a stage by name, with or without the text LM, on clips of `shortest` to `longest` seconds."""

    stage: str
    with_lm: bool
    shortest: float
    longest: float

    @property
    def label(self) -> str:
        """Return the name of the case in the table."""
        clips = f"{self.shortest:g}" if self.shortest == self.longest else f"{self.shortest:g}-{self.longest:g}"
        return f"{self.stage} | {'yes' if self.with_lm else 'no'} | {clips} s"


@dataclass(frozen=True)
class Result:
    """The results of a case; `failure` says why there are none."""

    case: Case
    audio_seconds_per_second: float = float("nan")
    seconds_per_update: float = float("nan")
    flops_per_audio_second: float = float("nan")
    mfu: float = float("nan")
    peak_gib: float = float("nan")
    data_wait: float = float("nan")  # share of the time spent waiting for data
    failure: str = ""


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="cat_1b6")
    parser.add_argument("--stages", nargs="*", help="names of stages; all by default")
    parser.add_argument("--lm", choices=("both", "with", "without"), default="both")
    parser.add_argument("--clips", nargs="*", default=["10", "12-30"], help="seconds of the clips, as 10 or 12-30")
    parser.add_argument("--shards", nargs="*", help="packed folders to read instead of synthetic clips")
    parser.add_argument("--micro-batch-seconds", type=float, help="that of the experiment by default")
    parser.add_argument("--micro-batches", type=int, default=2, help="micro-batches per update, about")
    parser.add_argument("--updates", type=int, default=5, help="timed updates per case, after two others")
    parser.add_argument("--peak-tflops", type=float, default=H100_PEAK_TFLOPS)
    parser.add_argument("--limit-seconds", type=float, default=540.0, help="no case starts after so long")
    parser.add_argument("--profile", type=Path, help="folder for a profile of one update of every case")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser.parse_known_args()


def cases(options: argparse.Namespace, config: FitConfig) -> Iterator[Case]:
    """Yield every requested combination; with shards, the clip lengths are those of the data."""
    languages = {"both": (False, True), "with": (True,), "without": (False,)}[options.lm]
    for stage in options.stages or [stage.name for stage in config.stages]:
        for with_lm in languages if config.semantic is not None else (False,):
            for clips in ["0"] if options.shards else options.clips:
                shortest, _, longest = clips.partition("-")
                yield Case(stage, with_lm, float(shortest), float(longest or shortest))


def case_config(config: FitConfig, case: Case, options: argparse.Namespace) -> FitConfig:
    """Return the run's configuration with this stage only, with all losses at full weight from the first update."""
    by_name = {stage.name: stage for stage in config.stages}
    if case.stage not in by_name:
        raise SystemExit(f"--stages {case.stage}: {options.experiment} has {', '.join(by_name)}")
    seconds = options.micro_batch_seconds or config.data.micro_batch_seconds
    stage = by_name[case.stage].replace(
        warmup_updates=0,
        discriminator_warmup_updates=0,
        updates=options.updates + 2,
        batch_seconds=seconds * options.micro_batches,
    )
    return config.replace(
        stages=[stage],
        data=config.data.replace(train=options.shards or [], micro_batch_seconds=seconds),
        semantic=config.semantic if case.with_lm else None,
    )


def synthetic_updates(config: FitConfig, case: Case, module: CatModule) -> list[UpdateBatch]:
    """Return one update of noise and random text of the length of read speech, repeated; everything from one seed."""
    stage = config.stages[0]
    rate = module.tokenizer.sampling_rate
    draw = np.random.default_rng(0)
    count = max(1, round(stage.batch_seconds / ((case.shortest + case.longest) / 2)))
    lengths = np.sort((draw.uniform(case.shortest, case.longest, count) * rate).astype(np.int64))[::-1]
    data = config.data
    groups = split_by_length(lengths, round(data.micro_batch_seconds * rate), data.min_length_ratio)
    vocabulary = 0 if module.semantic is None else module.semantic.text.vocab_size
    batches = tuple(
        synthetic_batch(lengths[group.start : group.stop], module.tokenizer.config, vocabulary) for group in groups
    )
    return [UpdateBatch(batches, number, 0, ()) for number in range(stage.updates)]


def synthetic_batch(lengths: np.ndarray, config: MossAudioTokenizerConfig, vocabulary: int) -> Batch:
    """Return clips [B, C, T] of given lengths in samples; text if there is a vocabulary; a target if rates differ."""
    generator = torch.Generator().manual_seed(len(lengths))
    count, frames, ratio = len(lengths), -(-int(lengths[0]) // config.downsample_rate), config.output_ratio
    audio_lengths = torch.from_numpy(lengths.copy())
    shape = (count, config.number_channels, frames * config.downsample_rate * ratio)
    reference = torch.randn(shape, generator=generator) * 0.1
    reference *= torch.arange(shape[2]) < audio_lengths[:, None, None] * ratio
    audio = reference if ratio == 1 else resample(reference, config.output_sampling_rate, config.sampling_rate)
    text_lengths = (
        (audio_lengths * TEXT_TOKENS_PER_SECOND // config.sampling_rate).clamp(min=1)
        if vocabulary
        else audio_lengths * 0
    )
    shape = (count, int(text_lengths.max()))
    return Batch(
        audio=audio,
        audio_lengths=audio_lengths,
        text_tokens=torch.randint(max(vocabulary, 1), shape, generator=generator),
        text_lengths=text_lengths,
        task_ids=torch.zeros(count, dtype=torch.int64) - (0 if vocabulary else 1),
        quantizer_uniform=torch.rand(count, generator=generator),
        crop_uniform=torch.rand(count, generator=generator),
        sample_ids=tuple(map(str, range(count))),
        domains=("synthetic",) * count,
        target=None if ratio == 1 else reference,
        target_lengths=None if ratio == 1 else audio_lengths * ratio,
    )


class Meter(Callback):
    """Counts the FLOPs of the first update, skips the second, times the others, and profiles the last on request."""

    def __init__(self, updates: int, profile_path: Path | None) -> None:
        self.updates = updates
        self.profile_path = profile_path
        self.counter = FlopCounter()
        self.profiler: Any = None
        self.stack = ExitStack()
        self.counted_audio = self.timed_audio = self.wait = 0.0
        self.begin = self.end = self.last_end = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: UpdateBatch, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.stack.enter_context(self.counter)
        elif batch_idx == 2:
            synchronize()
            reset_peak()
            self.begin = time.perf_counter()
        elif batch_idx > 2:
            self.wait += time.perf_counter() - self.last_end
        if batch_idx == self.updates + 1 and self.profile_path is not None:
            self.profiler = profile(activities=activities())
            self.stack.enter_context(self.profiler)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: UpdateBatch, batch_idx: int
    ) -> None:
        seconds = (
            sum(int(micro.audio_lengths.sum()) for micro in batch.micro_batches) / pl_module.tokenizer.sampling_rate
        )
        if batch_idx == 0:
            self.stack.close()
            self.counted_audio = seconds
        elif batch_idx > 1:
            self.timed_audio += seconds
        if batch_idx == self.updates + 1:
            synchronize()
            self.end = time.perf_counter()
            self.stack.close()
        self.last_end = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        forget(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        forget(trainer, pl_module)

    def result(self, case: Case, peak_tflops: float) -> Result:
        """Return the results after the run."""
        elapsed = self.end - self.begin
        flops = self.counter.total / self.counted_audio
        speed = self.timed_audio / elapsed
        return Result(
            case,
            audio_seconds_per_second=speed,
            seconds_per_update=elapsed / self.updates,
            flops_per_audio_second=flops,
            mfu=flops * speed / (peak_tflops * 1e12),
            peak_gib=peak_memory() / 2**30,
            data_wait=self.wait / elapsed,
        )


def forget(trainer: Trainer, module: LightningModule) -> None:
    """Drop weights and moments, up to 26 GB, before the next case; reference cycles keep trainer and module alive."""
    for optimizer in trainer.optimizers:
        optimizer.state.clear()
    for parameter in module.parameters():
        parameter.grad = None
        parameter.data = parameter.data.new_empty(0)


def activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    """Return the peak memory in bytes: of the GPU since the last reset; on a CPU, of the process since it started."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(config: FitConfig, case: Case, options: argparse.Namespace) -> Result:
    """Run one case; an error, such as running out of memory, becomes the failure of its result."""
    profile_path = None if options.profile is None else options.profile / f"{case.label.replace(' | ', '-')}.txt"
    meter = Meter(options.updates, profile_path)
    try:
        settings = case_config(config, case, options)
        accelerator = choose_accelerator(settings.trainer.accelerator)
        trainer = build_trainer(settings.trainer.replace(devices=1), accelerator, [meter])
        with torch.device(accelerator):  # initializing cat_1b6 on a CPU takes half a minute (estimate)
            module = CatModule(**plan_initialization(settings).arguments)
        apply_optimizations(module, settings)
        trainer.fit(module, updates_of(settings, case, module, options))
        if profile_path is not None:
            write_profile(meter.profiler, profile_path)
        return meter.result(case, options.peak_tflops)
    except (torch.OutOfMemoryError, UserError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        return Result(case, failure=f"out of memory: {str(error).split('.')[0]}")
    finally:
        meter.stack.close()
        gc.collect()
        torch.cuda.empty_cache()


def updates_of(config: FitConfig, case: Case, module: CatModule, options: argparse.Namespace) -> Iterable[UpdateBatch]:
    """Return synthetic updates, or updates from the packed folders, read by the experiment's number of workers."""
    if not options.shards:
        updates = synthetic_updates(config, case, module)
        return DataLoader(updates, batch_size=None, collate_fn=unchanged, pin_memory=torch.cuda.is_available())
    stage = config.stages[0]
    return make_loader(
        open_stream(config, module.tokenizer.config),
        text_encoder=None if module.semantic is None else module.semantic.text,
        position=0,
        updates=[(number, stage.batch_seconds) for number in range(stage.updates)],
        micro_batch_seconds=config.data.micro_batch_seconds,
        max_text_tokens=config.data.max_text_tokens,
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def unchanged(item: Any) -> Any:
    return item


def write_profile(profiler: Any, path: Path) -> None:
    """Write the most expensive kernels or operators, and on a GPU the share of the time in which it was idle."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    events = profiler.key_averages()
    table = events.table(sort_by=f"self_{device}_time_total", row_limit=30, max_name_column_width=60)
    if device == "cuda":
        kernels = [
            event
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        ]
        span = max(event.time_range.end for event in kernels) - min(event.time_range.start for event in kernels)
        busy = sum(event.time_range.elapsed_us() for event in kernels)
        table += f"\nidle between the first and the last kernel: {1 - busy / span:.1%} of {span / 1e6:.3f} s\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table)


def table(results: list[Result]) -> str:
    """Return the results as a Markdown table, one line per case."""
    head = "stage | LM | clips | audio-s/s | s/update | TFLOP per audio-s | MFU | peak GiB | waiting for data"
    lines = [f"| {head} |", "|---" * 9 + "|"]
    for result in results:
        numbers = (
            f"{result.audio_seconds_per_second:,.1f} | {result.seconds_per_update:.3f} | "
            f"{result.flops_per_audio_second / 1e12:.4f} | {result.mfu:.2%} | {result.peak_gib:.1f} | "
            f"{result.data_wait:.1%}"
        )
        lines.append(f"| {result.case.label} | {result.failure or numbers} |")
    return "\n".join(lines)


def machine() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, lightning {lightning.__version__}"


def main() -> None:
    options, overrides = parse_arguments()
    config = load_config("fit", [f"experiment={options.experiment}", *overrides])
    begin = time.perf_counter()
    results = []
    for case in cases(options, config):
        if time.perf_counter() - begin > options.limit_seconds:
            results.append(Result(case, failure="not measured: --limit-seconds"))
            continue
        results.append(measure(config, case, options))
        print(table(results[-1:]).splitlines()[-1], flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps([asdict(result) for result in results], indent=1))
    print(f"\n{options.experiment}: {machine()}; MFU of {options.peak_tflops:g} TFLOP/s\n{table(results)}")


if __name__ == "__main__":
    main()
