"""What a run says about itself: a CSV with every update, a progress bar, and Weights & Biases when asked for."""

import csv
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch import Callback, LightningModule, Trainer

from moss_train.data.counting import StreamCounter
from moss_train.training.module import cat_module
from moss_train.training.objective import WEIGHTS
from moss_train.training.stages import PARTS
from moss_train.types import UpdateBatch
from moss_train.utils.progress import progress

COLUMNS = (
    "update",
    "stage",
    *(f"loss/{name}" for name in WEIGHTS),
    "loss/generator",
    "loss/discriminators",
    "text_accuracy",
    *(f"gradient_norm/{name}" for name in ("generator", *PARTS, "discriminators")),
    *(f"clip_factor/{name}" for name in ("generator", "discriminators")),
    "learning_rate/generator",
    "learning_rate/discriminators",
    "clips",
    "clips_with_text",
    "dropped_clips",
    "audio_seconds",
    "update_seconds",
    "data_wait_seconds",
)


class UpdateMetrics(Callback):
    """Collects one row per update and hands it to the writers."""

    def __init__(self, writers: Sequence["CsvWriter | WandbWriter | ProgressWriter"]) -> None:
        self.writers = writers
        self.batch_start = self.last_end = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_end = time.perf_counter()
        self.writers = self.writers if trainer.is_global_zero else []
        for writer in self.writers:
            writer.start(cat_module(pl_module).update)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: UpdateBatch, batch_idx: int
    ) -> None:
        self.batch_start = time.perf_counter()
        cat_module(pl_module).contributions |= {
            "clips": sum(micro.num_clips for micro in batch.micro_batches),
            "clips_with_text": sum(int((micro.text_lengths > 0).sum()) for micro in batch.micro_batches),
            "dropped_clips": len(batch.dropped),
            "audio_samples": sum(int(micro.audio_lengths.sum()) for micro in batch.micro_batches),
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: UpdateBatch, batch_idx: int
    ) -> None:
        end = time.perf_counter()
        module = cat_module(pl_module)
        rate = module.tokenizer.sampling_rate
        row = {
            "update": module.update,
            "stage": module.schedule.at(module.update - 1).stage.name,
            **module.metrics,
            **{name: round(module.sums[name]) for name in ("clips", "clips_with_text", "dropped_clips")},
            "audio_seconds": module.sums["audio_samples"] / rate,
            "update_seconds": end - self.last_end,
            "data_wait_seconds": self.batch_start - self.last_end,
        }
        self.last_end = end
        for writer in self.writers:
            writer.write(row)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for writer in self.writers:
            writer.close()


class StreamWatch(Callback):
    """Names samples that could not be read, counts the hours of every domain, and stops when too many are lost.

    The counts are those of all ranks and part of the checkpoint; each rank names its own lost samples.
    """

    def __init__(self, counter: StreamCounter, domains: Sequence[str]) -> None:
        self.counter = counter
        self.domains = domains

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: UpdateBatch, batch_idx: int
    ) -> None:
        for line in self.counter.name_lost(batch):
            print(line, file=sys.stderr)
        cat_module(pl_module).contributions |= self.counter.counts(batch, self.domains)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.counter.add_counts(cat_module(pl_module).sums)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        hours = ", ".join(f"{domain} {count:.2f} h" for domain, count in self.counter.hours.items())
        if trainer.is_global_zero:
            print(f"audio used: {hours}", file=sys.stderr)

    def state_dict(self) -> dict[str, Any]:
        return self.counter.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counter.load_state_dict(state_dict)


class CsvWriter:
    """`metrics.csv` with all COLUMNS and floats to the last bit; a resumed run goes on below its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, update: int) -> None:
        """Open the file, without rows of updates that are about to be done again."""
        kept = [row for row in read_metrics(self.path) if int(row["update"]) <= update]
        self.file = self.path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS, restval="")
        self.writer.writeheader()
        self.writer.writerows(kept)

    def write(self, row: dict[str, Any]) -> None:
        """Append and flush: a kill loses nothing."""
        self.writer.writerow(row)
        self.file.flush()

    def close(self) -> None:
        """Close the file; it may be called again."""
        if hasattr(self, "file"):
            self.file.close()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics file; none when there is no file, and no row that a kill cut short."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["data_wait_seconds"] and row["update"].isdigit()]


class ProgressWriter:
    """A progress bar over updates, with the losses that matter most."""

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.stack = ExitStack()

    def start(self, update: int) -> None:
        """Show the bar."""
        self.task = self.stack.enter_context(progress("training", total=self.updates, unit="updates"))
        self.task.advance(update)

    def write(self, row: dict[str, Any]) -> None:
        """Advance, with stage, losses and speed."""
        note = f"{row['stage']}: rec {row.get('loss/reconstruction', float('nan')):.3f}"
        if "loss/semantic" in row:
            note += f", sem {row['loss/semantic']:.2f}"
        if "loss/discriminators" in row:
            note += f", D {row['loss/discriminators']:.2f}"
        self.task.advance(1, note=f"{note}, {row['audio_seconds'] / row['update_seconds']:.0f} audio-s/s")

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.stack.close()


class WandbWriter:
    """Weights & Biases; trouble with it is a warning, never the end of a run.

    Args:
        directory: run directory; its name and parent name the run and the group.
        mode: whether to upload, or to keep what `wandb sync` uploads later.
    """

    def __init__(self, directory: Path, mode: Literal["online", "offline"]) -> None:
        self.directory = directory
        self.mode = mode
        self.run: Any = None

    def start(self, update: int) -> None:
        """Open or continue the run of this directory."""
        name = f"{self.directory.parent.name}-{self.directory.name}"
        try:
            self.run = wandb.init(
                project="moss_train", name=name, id=name, resume="allow", mode=self.mode, dir=str(self.directory)
            )
        except Exception as error:
            warnings.warn(f"wandb is off: {error}", stacklevel=2)

    def write(self, row: dict[str, Any]) -> None:
        """Log one row."""
        if self.run is not None:
            try:
                self.run.log(row, step=row["update"])
            except Exception as error:
                self.run = None
                warnings.warn(f"wandb is off: {error}", stacklevel=2)

    def close(self) -> None:
        """Finish the run."""
        if self.run is not None:
            self.run.finish()
            self.run = None


def column(rows: Iterable[dict[str, str]], name: str) -> list[float]:
    """One column as numbers, without rows in which it does not apply."""
    return [float(row[name]) for row in rows if row[name]]
