"""AdamW and its parameter groups, the clipped step, and the moving average (EMA) of the weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moss_train.config.recipe_schema import GeneratorOptimizerConfig, OptimizerConfig
from moss_train.model.transformer import LayerScale
from moss_train.training.distributed.fsdp import distribute_like, gather_to_rank0, local_tensor


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Return two AdamW groups: matrices decay; norms, biases, LayerScale, codebooks and embeddings do not.

    A parameter that modules share appears once; an output layer tied to an embedding counts as an embedding.
    """
    decayed: dict[nn.Parameter, None] = {}
    exempt: dict[nn.Parameter, None] = {}
    for module in (module for root in modules for module in root.modules()):
        is_exempt = isinstance(module, nn.LayerNorm | nn.Embedding | LayerScale)
        for parameter in module.parameters(recurse=False):
            is_vector = sum(size > 1 for size in parameter.shape) < 2
            (exempt if is_exempt or is_vector else decayed)[parameter] = None
    return [
        {"params": [p for p in decayed if p not in exempt], "weight_decay": weight_decay},
        {"params": list(exempt), "weight_decay": 0.0},
    ]


def build_adamw(parts: Mapping[str, nn.Module], settings: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over named parts (arXiv 1711.05101), two groups for each (see `parameter_groups`).

    Each part of the generator has its own factors on rate and decay: a text LM can need far higher values than a
    tokenizer tolerates.
    """
    rates: Mapping[str, float] = {}
    decays: Mapping[str, float] = {}
    if isinstance(settings, GeneratorOptimizerConfig):
        rates, decays = settings.learning_rate_scale.to_plain(), settings.weight_decay_scale.to_plain()
    groups = [
        {**group, "scale": rates.get(name, 1.0)}
        for name, part in parts.items()
        for group in parameter_groups([part], settings.weight_decay * decays.get(name, 1.0))
    ]
    first, second = settings.betas
    # Fused: one pass over weights, gradients and moments instead of one per operation.
    return torch.optim.AdamW(groups, lr=0.0, betas=(first, second), eps=settings.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set every group's learning rate. Rates are a function of the update, so there is no scheduler state to save."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["scale"]


def group_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return each group's options without its parameters, to be set again after a checkpoint restores older ones."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def restore_options(optimizer: torch.optim.Optimizer, options: Sequence[Mapping[str, Any]]) -> None:
    """Reapply the groups' options after the optimizer's state is restored, and move step counts to the weights' device.

    Fused AdamW needs each weight's step count on the device of the weight, but a restored state has it on the host.
    """
    for group, option in zip(optimizer.param_groups, options, strict=True):
        group.update(option)
        for parameter in group["params"]:
            step = optimizer.state.get(parameter, {}).get("step")
            if isinstance(step, Tensor):
                optimizer.state[parameter]["step"] = step.to(parameter.device, torch.float32)


def squared_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the sum of squares of all gradients that this rank holds (scalar, float64; zero when there are none)."""
    gradients = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()


def step_clipped(optimizer: Any, learning_rate: float, factor: Tensor, is_finite: Tensor) -> None:
    """Step with all gradients scaled by a factor, or skip the step; decided on the device, without a wait of the host.

    Args:
        optimizer: Lightning's wrapper of a fused optimizer.
        factor: scalar on the device.
        is_finite: bool on the device; if false, weights, moments and step counts keep every bit.
    """
    set_learning_rate(optimizer.optimizer, learning_rate)
    # As a GradScaler does: a fused optimizer divides gradients by grad_scale and skips the step if found_inf is 1.
    optimizer.optimizer.grad_scale = factor.reciprocal().float()
    optimizer.optimizer.found_inf = (~is_finite).float()
    optimizer.step()
    optimizer.optimizer.grad_scale = optimizer.optimizer.found_inf = None


CHECKPOINT_KEY = "ema"
"""Key in a checkpoint of {"decay": float, "weights": {name as in the tokenizer's state dict: tensor}}."""


class EMA:
    """Moving average of a model's weights, which every rank computes for what it holds, without communication.

    After every update, average <- d * average + (1 - d) * weights with d = min(decay, (1 + update) / (10 + update)).
    The smaller d of the first updates forgets the initial weights quickly.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._stored: dict[str, Tensor] = {}  # averages of a checkpoint, until `start`, when the model is on its device
        self._averages: dict[str, Tensor] = {}
        self._weights: dict[str, nn.Parameter] = {}

    def start(self, model: nn.Module) -> None:
        """Start from the model's current weights, or continue from the loaded averages."""
        self._weights = dict(model.named_parameters())
        for name, weight in self._weights.items():
            value = self._stored.get(name)
            own = weight.detach()
            self._averages[name] = own.clone() if value is None else distribute_like(value, own)
        self._stored = {}

    @torch.no_grad()
    def add(self, update: int) -> None:
        """Add the weights after update number `update` (from 0) to the average."""
        decay = min(self.decay, (1 + update) / (10 + update))
        averages = [local_tensor(average) for average in self._averages.values()]
        torch._foreach_lerp_(averages, [local_tensor(weight.detach()) for weight in self._weights.values()], 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Swap the averaged weights into the model inside the `with` block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            own = weight.detach().clone()
            weight.copy_(self._averages[name])
            self._averages[name].copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """Return whole tensors, whatever the strategy. All ranks have to call it; rank 0 writes the checkpoint."""
        weights = {name: gather_to_rank0(average) for name, average in self._averages.items()}
        return {"decay": self.decay, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the averages of a checkpoint, from which `start` continues."""
        self._stored = dict(state["weights"])
