"""Log codebook use during training, level by level."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moss_train.evaluation.metrics.codebooks import level_use
from moss_train.training.distributed.collectives import sum_over_ranks
from moss_train.training.loggers.base import LoggerCollection
from moss_train.training.module import cat_module, update_result
from moss_train.training.step.update import no_codes

STATE = "code_counts"


class CodebookMetrics(Callback):
    """Hands the log usage and perplexity of every level over so many updates together.

    A checkpoint holds what was counted since the last row; of several ranks, those of the first, which stand for all.
    """

    def __init__(self, run_log: LoggerCollection, every_updates: int) -> None:
        self.run_log = run_log
        self.every_updates = every_updates
        self.counts: Tensor | None = None  # [N, V] since the last row, on the device

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        module, counts = cat_module(pl_module), update_result(outputs).code_counts
        self.counts = counts if self.counts is None else self.counts.to(counts.device) + counts
        if module.update % self.every_updates == 0:
            self.run_log.write(
                "codebooks", {"update": module.update, **codebook_row(sum_over_ranks(self.counts).cpu())}
            )
            self.counts = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        counts = no_codes(cat_module(pl_module).tokenizer) if self.counts is None else self.counts
        checkpoint[STATE] = counts.cpu()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.counts = checkpoint.get(STATE)


def codebook_columns(num_quantizers: int) -> tuple[str, ...]:
    """Columns of `codebooks.csv`."""
    levels = range(1, num_quantizers + 1)
    each = [f"{name}/{level}" for name in ("usage", "perplexity") for level in levels]
    return ("update", "frames", "mean_usage", "mean_perplexity", *each)


def codebook_row(counts: Tensor) -> dict[str, float]:
    """Use of every level from counts [N, V]: the share of its codes that occur, and the perplexity of their use.

    Empty when nothing was counted.
    """
    levels = level_use(list(counts))
    if not levels:
        return {}
    return {
        "frames": levels[0].num_frames,
        "mean_usage": sum(level.usage for level in levels) / len(levels),
        "mean_perplexity": sum(level.perplexity for level in levels) / len(levels),
        **{f"usage/{level.level}": level.usage for level in levels},
        **{f"perplexity/{level.level}": level.perplexity for level in levels},
    }
