"""What tests of gradients share."""

from dataclasses import replace
from typing import Any

import torch

from moss_train.batch import Batch, UpdateBatch
from moss_train.training import CatModule
from moss_train.training.step.update import forward_backward


def backward(loss: torch.Tensor, **options: Any) -> None:
    """As `CatModule.manual_backward`, which works in a Trainer only."""
    with torch.autocast("cpu", enabled=False):
        loss.backward(**options)


def accumulate(module: CatModule, batches: tuple[Batch, ...], number: int) -> dict[str, torch.Tensor]:
    """Gradients of update `number` over the given micro-batches, by parameter name."""
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
    """Norm of the difference of two sets of gradients as a share of their norm, network by network."""
    errors = {}
    for part in sorted({name.split(".")[0] for name in expected}):
        names = [name for name in expected if name.startswith(part)]
        norm = torch.stack([expected[name].norm() for name in names]).norm()
        assert norm > 0, part
        errors[part] = float(torch.stack([(found[name] - expected[name]).norm() for name in names]).norm() / norm)
    return errors


def pick(batch: Batch, chosen: list[int]) -> Batch:
    """Some clips of a batch, in a micro-batch of their own."""
    tensors = {name: value[chosen] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    names = {name: tuple(getattr(batch, name)[i] for i in chosen) for name in ("sample_ids", "domains")}
    return replace(batch, **tensors, **names)


def without_text(update: UpdateBatch) -> UpdateBatch:
    """The same update with clips that have no text."""
    batches = [replace(batch, text_lengths=torch.zeros_like(batch.text_lengths)) for batch in update.micro_batches]
    return replace(update, micro_batches=tuple(batches))
