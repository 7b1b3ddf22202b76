"""Log metrics of every update, use of the codebooks and hours of audio."""

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moss_train.batch import UpdateBatch
from moss_train.data.stream.sample_reader import StreamCounter
from moss_train.evaluation.metrics.codes import codebook_row
from moss_train.training.cost.mfu import Utilization
from moss_train.training.distributed.collectives import sum_over_ranks
from moss_train.training.loggers.base import LoggerCollection
from moss_train.training.module import CatModule, cat_module, update_result
from moss_train.training.step.objective import SCORES, Objective, gradient_shares
from moss_train.training.step.schedule import PARTS
from moss_train.training.step.update import UpdateResult, no_codes
from moss_train.utils.files import printable

CODE_COUNTS = "code_counts"  # key in a checkpoint
SIDES = ("generator", "discriminators")
CLOCK_COLUMNS = (
    "audio_seconds_per_second",
    "mfu",
    "hfu",
    "update_seconds",
    "data_wait_seconds",
    "callback_seconds",
    "checkpoint_seconds",
)
"""Columns that depend on measured time; all others are the same in every run of one configuration."""


def metric_columns(objective: Objective) -> tuple[str, ...]:
    """Return the columns of `metrics.csv`; every loss of the objective has its own."""
    return (
        "update",
        "stage",
        *(f"loss/{name}" for name in objective.names),
        "loss/generator",
        "loss/discriminators",
        *(f"weighted/{name}" for name in objective.names),
        *(f"gradient_share/{name}" for name in objective.output_names),
        "text_accuracy",
        *SCORES,
        *(f"gradient_norm/{name}" for name in ("generator", *PARTS, "discriminators")),
        *(f"clip_factor/{name}" for name in SIDES),
        *(f"learning_rate/{name}" for name in SIDES),
        "clips",
        "clips_with_text",
        "dropped_clips",
        "audio_seconds",
        *CLOCK_COLUMNS,
    )


class StepTimer(Callback):
    """Runs after all other callbacks, so that their time after an update does not count for the next update."""

    def __init__(self) -> None:
        self.free = time.perf_counter()  # when the last update and its callbacks were done
        self.checkpoint_seconds = 0.0  # spent on writing since the last update

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.free = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.free = time.perf_counter()


class UpdateMetrics(Callback):
    """Logs a row of metrics per update, and the use of the codebooks and hours of audio every `every_updates` updates.

    Each rank prints the samples that it could not read, and too many of them stop the run. Hours per domain are summed
    over all ranks. A checkpoint stores them, and the code counts since the last row: only those of rank 0, with which
    every rank resumes.

    `run_log` is not called `log` because Lightning sets a `log` on every callback.
    """

    def __init__(
        self,
        run_log: LoggerCollection,
        clock: StepTimer,
        utilization: Utilization,
        counter: StreamCounter,
        domains: Sequence[str],
        every_updates: int,
    ) -> None:
        self.run_log = run_log
        self.clock = clock
        self.utilization = utilization
        self.counter = counter
        self.domains = domains
        self.every_updates = every_updates
        self.code_counts: Tensor | None = None  # [N, V] since the last row, on the device
        self.batch_start = self.last_end = time.perf_counter()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_end = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cat_module(pl_module)
        module.counters.append(lambda batch: count_clips(module, batch))
        module.counters.append(lambda batch: self.counter.counts(batch, self.domains))
        self.run_log.start(module.update, is_main=trainer.is_global_zero)
        if trainer.is_global_zero:
            self.utilization.start(module, trainer.strategy.root_device, trainer.world_size)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: UpdateBatch, batch_idx: int
    ) -> None:
        self.batch_start = time.perf_counter()
        for line in self.counter.describe_dropped(batch):
            print(printable(line), file=sys.stderr)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: UpdateBatch, batch_idx: int
    ) -> None:
        end = time.perf_counter()
        module, result = cat_module(pl_module), update_result(outputs)
        schedule_state, sums = module.schedule.at(module.update - 1), result.sums
        audio_seconds = sums["audio_samples"] / module.tokenizer.sampling_rate
        update_seconds = end - self.clock.free
        content = {**sums, "audio_seconds": audio_seconds}
        row = {
            "update": module.update,
            "stage": schedule_state.stage.name,
            **loss_row(result),
            **{name: round(sums[name]) for name in ("clips", "clips_with_text", "dropped_clips")},
            "audio_seconds": audio_seconds,
            "audio_seconds_per_second": audio_seconds / update_seconds,
            **self.utilization.shares(content, schedule_state, update_seconds),
            "update_seconds": update_seconds,
            "data_wait_seconds": self.batch_start - self.clock.free,
            "callback_seconds": self.clock.free - self.last_end,
            "checkpoint_seconds": self.clock.checkpoint_seconds,
        }
        self.run_log.write("metrics", row)
        self.last_end, self.clock.checkpoint_seconds = end, 0.0
        self.counter.add_counts(sums)
        counts = result.code_counts
        self.code_counts = counts if self.code_counts is None else self.code_counts.to(counts.device) + counts
        if module.update % self.every_updates == 0:
            use = codebook_row(sum_over_ranks(self.code_counts).cpu())
            self.run_log.write("audio_hours", {"update": module.update, **self.counter.hours})
            self.run_log.write("codebooks", {"update": module.update, **use})
            self.code_counts = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        hours = ", ".join(f"{domain} {count:.2f} h" for domain, count in self.counter.hours.items())
        if trainer.is_global_zero:
            print(printable(f"audio used: {hours}"), file=sys.stderr)

    @property
    def state_key(self) -> str:
        """Key of the hours in a checkpoint: the name of an earlier class, so that older runs can resume."""
        return "StreamWatch"

    def state_dict(self) -> dict[str, Any]:
        return self.counter.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counter.load_state_dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        counts = no_codes(cat_module(pl_module).tokenizer) if self.code_counts is None else self.code_counts
        checkpoint[CODE_COUNTS] = counts.cpu()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.code_counts = checkpoint.get(CODE_COUNTS)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.run_log.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning does not call teardown after an exception; the terminal would stay without its cursor.
        self.run_log.close()


def count_clips(module: CatModule, batch: UpdateBatch) -> dict[str, float]:
    """Count clips, audio samples, text frames and text tokens in one rank's part of an update.

    Text frames and tokens are those of the clips that have a text, and `text_squares` is the sum of (frames + tokens)^2
    over these clips. Lengths are read from the host's copy: reading them from the device would wait for it.
    """
    hosts = [micro.host or micro for micro in batch.micro_batches]
    none = torch.zeros(0, dtype=torch.int64)
    tokens = torch.cat([none, *(host.text_lengths for host in hosts)])
    lengths = torch.cat([none, *(host.audio_lengths for host in hosts)])
    frames = module.tokenizer.num_frames(lengths) * (tokens > 0)
    return {
        "clips": len(lengths),
        "clips_with_text": int((tokens > 0).sum()),
        "dropped_clips": len(batch.dropped),
        "audio_samples": int(lengths.sum()),
        "text_frames": int(frames.sum()),
        "text_tokens": int(tokens.sum()),
        "text_squares": int((frames + tokens).square().sum()),
    }


def loss_row(result: UpdateResult) -> dict[str, float]:
    """Return the metrics of an update, with the weighted loss of every term and, if measured, its share of the
    gradient.
    """
    weighted = {
        f"weighted/{name}": weight * result.metrics[f"loss/{name}"]
        for name, weight in result.weights.items()
        if f"loss/{name}" in result.metrics
    }
    shares = gradient_shares(result.output_norms, result.weights)
    return result.metrics | weighted | {f"gradient_share/{name}": share for name, share in shares.items()}
