"""Updates that were skipped because something was not finite: what was in them, in `skipped.jsonl`."""

import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moss_train.training.module import CatModule, cat_module
from moss_train.types import UpdateBatch

SKIPPED_FILE = "skipped.jsonl"


class SkipRecord(Callback):
    """Writes a line per rank for every skipped update, the last one before the run stops included."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / SKIPPED_FILE
        self.batch: UpdateBatch | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: UpdateBatch, batch_idx: int
    ) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._record(trainer, cat_module(pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._record(trainer, cat_module(pl_module))

    def _record(self, trainer: Trainer, module: CatModule) -> None:
        batch, self.batch = self.batch, None
        bad = [name for name, value in module.metrics.items() if not math.isfinite(value)]
        if batch is None or not bad:
            return
        ids = [name for micro_batch in batch.micro_batches for name in micro_batch.sample_ids]
        entry = {
            "update": batch.update + 1,  # as in metrics.csv
            "rank": trainer.global_rank,
            "not_finite": bad,
            "next_position": batch.next_position,
            "sample_ids": ids,
        }
        # One write at the end of the file: ranks share it.
        with self.path.open("a") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
