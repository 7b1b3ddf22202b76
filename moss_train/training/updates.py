"""One update: the gradients of all micro-batches of all ranks, then a step of both optimizers or of none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor, nn

from moss_train.batch import UpdateBatch
from moss_train.training.distributed.collectives import (
    gather_over_ranks,
    max_over_ranks,
    num_ranks,
    sum_gradients,
    sum_over_ranks,
    sum_to_host,
)
from moss_train.training.distributed.fsdp import is_sharded
from moss_train.training.micro_batches import accumulate, keep_company
from moss_train.training.step.diagnostics import OBSERVED
from moss_train.training.step.objective import WEIGHTS, UpdateCounts
from moss_train.training.step.optimizers import scale_gradients, set_learning_rate, squared_norm
from moss_train.training.step.schedule import StageMoment

if TYPE_CHECKING:
    from moss_train.training.module import CatModule

TERMS = (*(f"loss/{name}" for name in WEIGHTS), "loss/generator", "loss/discriminators", "text_accuracy", *OBSERVED)
"""What micro-batches report; a term is there in an update in which any rank has it."""


@dataclass(frozen=True)
class Side:
    """One optimizer with what it moves in this update, by part."""

    name: str
    optimizer: Any
    peak: float  # learning rate
    parts: dict[str, list[nn.Parameter]]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of all parts."""
        return [parameter for parameters in self.parts.values() for parameter in parameters]


def do_update(module: "CatModule", batch: UpdateBatch, moment: StageMoment) -> None:
    """Do one update; `module.metrics` and `module.sums` hold its numbers afterwards, the same on every rank."""
    terms = compute_terms(module, batch, moment)
    sides = learning_sides(module, moment)
    numbers = reduce(module, sides, terms, batch)
    module.metrics = {name: numbers[name] for name in TERMS if numbers[f"has/{name}"]}
    module.sums = {name: numbers[f"sum/{name}"] for name in module.contributions}
    if not numbers["num_clips"]:
        return
    norms = {name: math.sqrt(numbers[f"square/{name}"]) for side in sides for name in side.parts}
    module.metrics |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
    is_finite = all(map(math.isfinite, module.metrics.values()))
    for side in sides:
        step(module, side, math.hypot(*(norms[name] for name in side.parts)), moment, is_finite)
    note_skip(module, is_finite, batch)


def compute_terms(module: "CatModule", batch: UpdateBatch, moment: StageMoment) -> dict[str, Tensor]:
    """Add up the gradients of this rank's micro-batches; returns its share of every term."""
    counts = UpdateCounts.from_vector(
        sum_over_ranks(module.objective.count(batch.micro_batches, module.device).vector())
    )
    terms: dict[str, Tensor] = {}
    num_own = len(batch.micro_batches)
    num_turns = num_own if module.shards is None else max_over_ranks(num_own, module.device)
    for micro_batch in batch.micro_batches:
        for name, value in accumulate(module, micro_batch, counts, moment).items():
            terms[name] = terms.get(name, 0) + value
    for _ in range(num_turns - num_own):
        keep_company(module, moment)
    return terms


def learning_sides(module: "CatModule", moment: StageMoment) -> list[Side]:
    """What moves in this update: the generator's trained parts, and the discriminators when it is their turn."""
    optimizers: Any = module.optimizers()
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    parts = {name: list(part.parameters()) for name, part in module.parts().items() if name in moment.stage.train}
    sides = [Side("generator", optimizers[0], moment.stage.learning_rate, parts)]
    if moment.discriminators_learn:
        judges = {"discriminators": module.discriminator_parameters()}
        sides.append(Side("discriminators", optimizers[1], moment.stage.discriminator_learning_rate, judges))
    return sides


def reduce(
    module: "CatModule", sides: Sequence[Side], terms: dict[str, Tensor], batch: UpdateBatch
) -> dict[str, float]:
    """Sum gradients and numbers over ranks.

    A parameter that got no gradient on any rank has none afterwards, as in one process: zeros would decay its moments.
    """
    parameters = [parameter for side in sides for parameter in side.parameters]
    missing = {f"missing/{i}": p.grad is None for i, p in enumerate(parameters)} if num_ranks() > 1 else {}
    for side in sides:
        for part in side.parts.values():
            sum_gradients([p for p in part if not is_sharded(p)], module.reduce_dtype)
    squares = {f"square/{name}": share_of_square(part) for side in sides for name, part in side.parts.items()}
    zero = torch.zeros((), device=module.device)
    values: dict[str, Tensor | float] = {
        **{name: terms.get(name, zero) for name in TERMS},
        **{name: square.to(module.device) for name, square in squares.items()},
        **{f"has/{name}": name in terms for name in TERMS},
        **{f"sum/{name}": value for name, value in module.contributions.items()},
        **missing,
        "num_clips": sum(micro_batch.num_clips for micro_batch in batch.micro_batches),
    }
    numbers = sum_to_host(values, module.device)
    for parameter, name in zip(parameters, missing, strict=False):
        if numbers[name] == num_ranks():
            parameter.grad = None
    if module.semantic is not None and not numbers["has/loss/semantic"]:
        module.semantic.zero_grad(set_to_none=True)  # of passes that kept others company
    return numbers


def share_of_square(parameters: Sequence[nn.Parameter]) -> Tensor:
    """This rank's share of the squared norm of gradients: of its shards all, of what every rank has an equal part."""
    held = [p for p in parameters if is_sharded(p)]
    common = [p for p in parameters if not is_sharded(p)]
    return squared_norm(held) + squared_norm(common) / num_ranks()


def step(module: "CatModule", side: Side, norm: float, moment: StageMoment, is_finite: bool) -> None:
    """Clip and step one side, unless something in the update is not finite; its gradients are gone afterwards."""
    rate = side.peak * moment.stage.rate_factor(moment.update)
    clip_norm = module.optimizer_settings.get(side.name, {}).get("clip_norm", 1.0)
    factor = min(1.0, clip_norm / (norm + 1e-6))
    module.metrics |= {
        f"gradient_norm/{side.name}": norm,
        f"clip_factor/{side.name}": factor,
        f"learning_rate/{side.name}": rate,
    }
    if is_finite:
        scale_gradients(side.parameters, factor)
        set_learning_rate(side.optimizer.optimizer, rate)
        side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)


def note_skip(module: "CatModule", is_finite: bool, batch: UpdateBatch) -> None:
    """Count updates in a row that were skipped, name their samples, and stop after too many."""
    module.skipped_in_a_row = 0 if is_finite else module.skipped_in_a_row + 1
    if is_finite:
        return
    mine = [name for micro_batch in batch.micro_batches for name in micro_batch.sample_ids]
    ids = [name for names in gather_over_ranks(mine) for name in names]
    bad = [name for name, value in module.metrics.items() if not math.isfinite(value)]
    message = f"update {module.update} skipped: {', '.join(bad)} not finite; samples {', '.join(ids[:8])}"
    if module.skipped_in_a_row >= module.max_skipped_updates:
        raise FloatingPointError(f"{message}; {module.skipped_in_a_row} in a row, stopping. Try a lower rate.")
    lightning.pytorch.utilities.rank_zero_warn(message)
