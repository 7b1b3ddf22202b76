"""An exponential moving average of the tokenizer's weights, beside the weights that learn."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moss_train.training.distributed.fsdp import gather_to_rank0, like, local_part

CHECKPOINT_KEY = "ema"
"""Place in a checkpoint: {"decay": float, "weights": {name as in the tokenizer's state dict: tensor}}."""


class EMA:
    """average <- d * average + (1 - d) * weights after every update, d = min(decay, (1 + update) / (10 + update)).

    The smaller d of the first updates forgets the initial weights. Rank by rank the same: it needs no communication.

    Raises:
        ValueError: a decay outside [0, 1).
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay={decay} has to be at least 0 and below 1")
        self.decay = decay
        self._stored: dict[str, Tensor] = {}  # of a checkpoint, until the module is where it trains
        self._averages: list[Tensor] = []
        self._weights: list[nn.Parameter] = []
        self._names: list[str] = []

    def start(self, model: nn.Module) -> None:
        """Begin with the model's weights as they are, or go on with those that were loaded."""
        parameters = dict(model.named_parameters())
        self._names, self._weights = list(parameters), list(parameters.values())
        stored = [self._stored.get(name) for name in parameters]
        self._averages = [
            weight.detach().clone() if value is None else like(value, weight.detach())
            for weight, value in zip(self._weights, stored, strict=True)
        ]
        self._stored = {}

    @torch.no_grad()
    def add(self, update: int) -> None:
        """Take in the weights after update number `update` (from 0)."""
        decay = min(self.decay, (1 + update) / (10 + update))
        averages = [local_part(average) for average in self._averages]
        torch._foreach_lerp_(averages, [local_part(weight.detach()) for weight in self._weights], 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, average in zip(self._weights, self._averages, strict=True):
            own = weight.detach().clone()
            weight.copy_(average)
            average.copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: whole tensors, whatever the strategy; all ranks have to call it, the first writes it."""
        averages = zip(self._names, self._averages, strict=True)
        return {"decay": self.decay, "weights": {name: gather_to_rank0(average) for name, average in averages}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, from `start` on, with what a checkpoint holds."""
        self._stored = dict(state["weights"])
