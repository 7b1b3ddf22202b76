"""What an update is measured by: the row of `metrics.csv`, and the audio that has gone into the run."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moss_train.batch import UpdateBatch
from moss_train.data.stream.sample_stats import StreamCounter
from moss_train.training.cost.mfu import UTILIZATION, UpdateContent, Utilization
from moss_train.training.loggers.base import RunLog
from moss_train.training.module import CatModule, cat_module
from moss_train.training.step.diagnostics import OUTPUT_GRADIENT, OUTPUT_TERMS, weights_at
from moss_train.training.step.objective import WEIGHTS
from moss_train.training.step.schedule import PARTS

SIDES = ("generator", "discriminators")
COLUMNS = (
    "update",
    "stage",
    *(f"loss/{name}" for name in WEIGHTS),
    "loss/generator",
    "loss/discriminators",
    *(f"weighted/{name}" for name in WEIGHTS),
    *(f"gradient_share/{name}" for name in OUTPUT_TERMS),
    "text_accuracy",
    "discriminator/real",
    "discriminator/generated",
    *(f"gradient_norm/{name}" for name in ("generator", *PARTS, "discriminators")),
    *(f"clip_factor/{name}" for name in SIDES),
    *(f"learning_rate/{name}" for name in SIDES),
    "clips",
    "clips_with_text",
    "dropped_clips",
    "audio_seconds",
    "audio_seconds_per_second",
    *UTILIZATION,
    "update_seconds",
    "data_wait_seconds",
    "other_seconds",
    "checkpoint_seconds",
)
CLOCK_COLUMNS = (
    "audio_seconds_per_second",
    *UTILIZATION,
    "update_seconds",
    "data_wait_seconds",
    "other_seconds",
    "checkpoint_seconds",
)
"""What a clock measured; everything else is the same in every run of one configuration."""


class Clock(Callback):
    """The last of the callbacks: what the others do after an update is not part of the next one's time."""

    def __init__(self) -> None:
        self.free = time.perf_counter()  # when the last update and all that followed it was over
        self.checkpoint_seconds = 0.0  # of writing since the last update

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.free = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.free = time.perf_counter()


class UpdateMetrics(Callback):
    """Hands the log one row per update.

    Args:
        run_log: of the run (Lightning gives every callback a function `log`).
        clock: the last callback of the run.
        utilization: counts what an update costs.
        shares_every_updates: how often the terms' shares of the gradient at the decoder's output are measured.
    """

    def __init__(
        self, run_log: RunLog, clock: Clock, utilization: Utilization, shares_every_updates: int | None = None
    ) -> None:
        self.run_log = run_log
        self.clock = clock
        self.utilization = utilization
        self.shares_every_updates = shares_every_updates
        self.batch_start = self.last_end = time.perf_counter()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_end = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run_log.start(cat_module(pl_module).update, is_main=trainer.is_global_zero)
        if trainer.is_global_zero:
            self.utilization.start(cat_module(pl_module), trainer.strategy.root_device, trainer.world_size)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: UpdateBatch, batch_idx: int
    ) -> None:
        self.batch_start = time.perf_counter()
        module = cat_module(pl_module)
        every = self.shares_every_updates
        module.measures_output_gradient = every is not None and (module.update + 1) % every == 0
        module.contributions |= {
            "clips": sum(micro.num_clips for micro in batch.micro_batches),
            "clips_with_text": sum(int((micro.text_lengths > 0).sum()) for micro in batch.micro_batches),
            "dropped_clips": len(batch.dropped),
            "audio_samples": sum(int(micro.audio_lengths.sum()) for micro in batch.micro_batches),
            **text_sizes(module, batch),
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: UpdateBatch, batch_idx: int
    ) -> None:
        end = time.perf_counter()
        self.run_log.write("metrics", self._row(cat_module(pl_module), end))
        self.last_end, self.clock.checkpoint_seconds = end, 0.0

    def _row(self, module: CatModule, end: float) -> dict[str, Any]:
        moment = module.schedule.at(module.update - 1)
        sums = module.sums
        audio_seconds = sums["audio_samples"] / module.tokenizer.sampling_rate
        update_seconds = end - self.clock.free
        counts = ("clips", "clips_with_text", "text_frames", "text_tokens", "text_squares")
        content = UpdateContent(audio_seconds, *(sums[name] for name in counts))
        return {
            "update": module.update,
            "stage": moment.stage.name,
            **split_metrics(module.metrics, weights_at(module.objective.weights, moment)),
            **{name: round(sums[name]) for name in ("clips", "clips_with_text", "dropped_clips")},
            "audio_seconds": audio_seconds,
            "audio_seconds_per_second": audio_seconds / update_seconds,
            **self.utilization.shares(content, moment, update_seconds),
            "update_seconds": update_seconds,
            "data_wait_seconds": self.batch_start - self.clock.free,
            "other_seconds": self.clock.free - self.last_end,
            "checkpoint_seconds": self.clock.checkpoint_seconds,
        }

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.run_log.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning does not come to teardown then; the terminal would stay without its cursor.
        self.run_log.close()


def text_sizes(module: CatModule, batch: UpdateBatch) -> dict[str, int]:
    """Frames and tokens of those clips that have a text, and the sum of the squares of both together."""
    none = torch.zeros(0, dtype=torch.int64, device=module.device)
    tokens = torch.cat([none, *(micro.text_lengths for micro in batch.micro_batches)])
    lengths = torch.cat([none, *(micro.audio_lengths for micro in batch.micro_batches)])
    frames = module.tokenizer.num_frames(lengths) * (tokens > 0)
    sums = torch.stack([frames.sum(), tokens.sum(), (frames + tokens).square().sum()]).tolist()
    return dict(zip(("text_frames", "text_tokens", "text_squares"), sums, strict=True))


def split_metrics(metrics: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """The numbers of an update with every term also weighted, and squared gradient norms turned into shares."""
    squares = {name: value for name, value in metrics.items() if name.startswith(OUTPUT_GRADIENT)}
    norms = {name.removeprefix(OUTPUT_GRADIENT): math.sqrt(value) for name, value in squares.items()}
    total = sum(norms.values())
    return {
        **{name: value for name, value in metrics.items() if name not in squares},
        **{
            f"weighted/{name}": weights[name] * metrics[f"loss/{name}"] for name in WEIGHTS if f"loss/{name}" in metrics
        },
        **{f"gradient_share/{name}": norm / total for name, norm in norms.items() if total},
    }


class StreamWatch(Callback):
    """Names samples that could not be read, counts the hours of every domain, and stops when too many are lost.

    The counts are those of all ranks and part of the checkpoint; each rank names its own lost samples.
    """

    def __init__(self, counter: StreamCounter, domains: Sequence[str], run_log: RunLog, every_updates: int) -> None:
        self.counter = counter
        self.domains = domains
        self.run_log = run_log
        self.every_updates = every_updates

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: UpdateBatch, batch_idx: int
    ) -> None:
        for line in self.counter.name_lost(batch):
            print(line, file=sys.stderr)
        cat_module(pl_module).contributions |= self.counter.counts(batch, self.domains)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        module = cat_module(pl_module)
        self.counter.add_counts(module.sums)
        if module.update % self.every_updates == 0:
            self.run_log.write("audio_hours", {"update": module.update, **self.counter.hours})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        hours = ", ".join(f"{domain} {count:.2f} h" for domain, count in self.counter.hours.items())
        if trainer.is_global_zero:
            print(f"audio used: {hours}", file=sys.stderr)

    def state_dict(self) -> dict[str, Any]:
        return self.counter.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counter.load_state_dict(state_dict)
