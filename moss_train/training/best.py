"""The best checkpoint of a run: the one with the best value of one score on held-out audio."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from moss_train.training.module import cat_module
from moss_train.utils.checkpoints import BestCheckpoint, checkpoint_name, read_best, record_best
from moss_train.utils.errors import UserError

HIGHER_IS_BETTER = ("text_accuracy", "mean_usage", "mean_perplexity", "usage", "perplexity")


class BestKeeper:
    """Has a checkpoint written whenever a score is better than ever, and records which one it is.

    Args:
        directory: of the checkpoints.
        metric: column of `validation.csv`.
        higher: columns, beside those of HIGHER_IS_BETTER, of which more is better.
        save: writes the checkpoint of this update, unless it is there.
    """

    def __init__(
        self,
        directory: Path,
        metric: str,
        higher: frozenset[str],
        save: Callable[[Trainer, LightningModule], None],
    ) -> None:
        self.directory = directory
        self.metric = metric
        self.sign = -1.0 if metric in higher or metric.partition("/")[0] in HIGHER_IS_BETTER else 1.0
        self.save = save
        self.best: BestCheckpoint | None = None

    def start(self, trainer: Trainer, update: int) -> None:
        """Remember the best checkpoint so far, unless it belongs to updates that are about to be done again."""
        best = trainer.strategy.broadcast(read_best(self.directory))
        self.best = best if best is not None and best.metric == self.metric and best.update <= update else None

    def consider(self, trainer: Trainer, pl_module: LightningModule, scores: Mapping[str, Any]) -> None:
        """Keep the checkpoint of this update if its score is the best one; the same on every rank."""
        value = scores.get(self.metric)
        if value is None or not math.isfinite(value):
            return
        if self.best is not None and self.sign * value >= self.sign * self.best.value:
            return
        self.save(trainer, pl_module)
        update = cat_module(pl_module).update
        self.best = BestCheckpoint(checkpoint_name(update), update, self.metric, value)
        if trainer.is_global_zero:
            record_best(self.directory, self.best)


def check_metric(metric: str, columns: tuple[str, ...]) -> str:
    """The metric, or UserError when no validation has it."""
    if metric not in columns[2:]:
        raise UserError(f"checkpoint.best={metric} is no score of the validation, which has {', '.join(columns[2:])}")
    return metric
