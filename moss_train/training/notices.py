"""Lines to the person who watches a run: plain, each once, without a place in the source code."""

import sys
from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer


def warn(message: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class Notices(Callback):
    """Says at the start of a run what it will not do, once and not on every rank."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = tuple(lines)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(*self.lines, sep="\n", end="\n" if self.lines else "", file=sys.stderr)
