"""Helpers for tests of gradients."""

from dataclasses import replace
from typing import Any

import torch

from moss_train.batch import Batch, UpdateBatch
from moss_train.training import CatModule
from moss_train.training.step.update import forward_backward


def backward(loss: torch.Tensor, **options: Any) -> None:
    """Run backward as `CatModule.manual_backward` does, which works only inside a Trainer."""
    with torch.autocast("cpu", enabled=False):
        loss.backward(**options)


def accumulate(module: CatModule, batches: tuple[Batch, ...], number: int) -> dict[str, torch.Tensor]:
    """Return the gradients of update `number` over the given micro-batches, by parameter name."""
    schedule_state = module.schedule.at(number)
    weights = module.objective.active_weights(schedule_state)

    module.manual_backward = backward
    module.zero_grad()
    counts = module.objective.count(batches)
    for batch in batches:
        forward_backward(
            module.networks, module.objective, batch, counts, schedule_state, weights, module.manual_backward
        )
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def network_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the relative error (norm of the difference / norm) of a set of gradients for each network."""
    errors = {}
    for part in sorted({name.split(".")[0] for name in expected}):
        names = [name for name in expected if name.startswith(part)]
        norm = torch.stack([expected[name].norm() for name in names]).norm()
        assert norm > 0, part
        errors[part] = float(torch.stack([(found[name] - expected[name]).norm() for name in names]).norm() / norm)
    return errors


def pick(batch: Batch, chosen: list[int]) -> Batch:
    """Return some clips of a batch as a separate micro-batch."""
    tensors = {name: value[chosen] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    names = {name: tuple(getattr(batch, name)[i] for i in chosen) for name in ("sample_ids", "domains")}
    return replace(batch, **tensors, **names)


def without_text(update: UpdateBatch) -> UpdateBatch:
    """Return the update without texts."""
    batches = [replace(batch, text_lengths=torch.zeros_like(batch.text_lengths)) for batch in update.micro_batches]
    return replace(update, micro_batches=tuple(batches))
