"""One of several processes that jointly compute the gradients of one update; started by `test_distributed`."""

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import moss_train.training.step.accumulation as accumulation
from moss_train.batch import UpdateBatch
from moss_train.training import CatModule
from moss_train.training.distributed.collectives import GradientSums
from moss_train.training.distributed.fsdp import is_sharded
from moss_train.training.step.update import OptimizerGroup, run_update
from tests.training.gradients import backward


class KeptGradients:
    """Replaces an optimizer: it neither steps nor clears gradients, so that those of an update can be read."""

    @property
    def optimizer(self) -> Any:
        """Return a stand-in for the optimizer that Lightning would wrap."""
        return SimpleNamespace(param_groups=[])

    def step(self) -> None:
        """Leave the weights as they are."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Leave the gradients as they are."""


def gradients(
    arguments: Mapping[str, Any],
    batch: UpdateBatch,
    number: int,
    mesh: DeviceMesh | None = None,
    half: torch.autocast | None = None,
    prepare: Callable[[CatModule], Any] = lambda module: None,
) -> tuple[dict, dict[str, float]]:
    """Return gradients by parameter name and metrics of update `number`, summed over the ranks if there are several.

    With a mesh, the large networks are sharded over it. With an autocast, the update runs inside it and sharded linear
    weights are gathered in bfloat16, as in a run with `bf16-mixed`.
    """
    module = CatModule(**arguments)
    prepare(module)
    module._device_mesh = mesh
    module.gather_dtype = None if half is None else torch.bfloat16
    module.configure_model()
    assert (module.shards is None) == (mesh is None)
    schedule_state = module.schedule.at(number)
    parts = {name: list(part.parameters()) for name, part in module.parts().items()}
    groups = [OptimizerGroup("generator", KeptGradients(), 0.0, math.inf, parts)]
    if schedule_state.discriminators_learn:
        discriminators = {"discriminators": list(module.discriminators.parameters())}
        groups.append(OptimizerGroup("discriminators", KeptGradients(), 0.0, math.inf, discriminators))

    def local_numbers(batch: UpdateBatch) -> dict[str, float]:
        return {"clips": float(sum(micro.num_clips for micro in batch.micro_batches))}

    with half or nullcontext():
        result = run_update(
            module.networks,
            module.objective,
            groups,
            backward,
            batch,
            schedule_state,
            local_numbers,
            measure_shares=True,
        )
    numbers = result.metrics | result.sums | {f"output/{name}": norm for name, norm in result.output_norms.items()}
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    found = {name: grad.full_tensor() if is_sharded(grad) else grad for name, grad in gradients.items()}
    return found, numbers


def sums_beside_backward(rank: int, names_unused: bool) -> dict[str, Any]:
    """Sum the gradients of three small networks over two ranks, which do two passes and one, only one with text.

    Returns the numbers of buckets sent before the end and in total, the sums, the expected sums, and which parameters
    had no gradient on this rank.
    """
    torch.manual_seed(0)
    encoder, decoder, text = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)
    parameters = [p for part in (encoder, decoder, text) for p in part.parameters()]
    inputs = [(0, torch.randn(5, 3), True), (0, torch.randn(5, 3), False), (1, torch.randn(5, 3), False)]

    def loss(audio: torch.Tensor, has_text: bool) -> torch.Tensor:
        hidden = encoder(audio).tanh()
        return decoder(hidden).square().sum() + (text(hidden).sum() if has_text else 0.0)

    of_ranks = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    for owner, audio, has_text in inputs:
        found = torch.autograd.grad(loss(audio, has_text), parameters, allow_unused=True)
        of_ranks[owner] = [
            total if part is None else total + part for total, part in zip(of_ranks[owner], found, strict=True)
        ]
    sums = GradientSums([list(part.parameters()) for part in (encoder, decoder, text)], bucket_bytes=1)
    passes = [(audio, has_text) for owner, audio, has_text in inputs if owner == rank]
    for number, (audio, has_text) in enumerate(passes, 1):
        unused = text.parameters() if names_unused and not has_text else ()
        with (
            sums.beside_backward(dict(zip(parameters, parameters, strict=True)), unused)
            if number == len(passes)
            else nullcontext()
        ):
            loss(audio, has_text).backward()
    sent = sums.num_sent
    sums.finish()
    return {
        "sent": (sent, sums.num_sent),
        "found": [p.grad for p in parameters],
        "expected": [a + b for a, b in zip(*of_ranks, strict=True)],
        "missing": [p in sums.missing for p in parameters],
    }


def bfloat16(keeps_casts: bool) -> torch.autocast:
    """Return an autocast that caches casts of weights until it ends, or casts them at each use like Lightning's."""
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps_casts)


def main(folder: Path, rank: int, world_size: int) -> None:
    """Read the work of this rank, do it, and store the result of each case."""
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=120), world_size=world_size, rank=rank)
    torch.save([sums_beside_backward(rank, named) for named in (True, False)], folder / f"sums{rank}.pt")
    work = torch.load(folder / "work.pt", weights_only=False)
    sharded = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    for name, mesh in (("replicated", None), ("sharded", sharded)):
        results = [gradients(work["arguments"], batches[rank], number, mesh) for batches, number in work["cases"]]
        torch.save(results, folder / f"{name}{rank}.pt")
        for keeps_casts in (True,) if mesh is None else (False, True):
            results = [
                gradients(work["arguments"], batches[rank], number, mesh, bfloat16(keeps_casts))
                for batches, number in work["half_cases"]
            ]
            torch.save(results, folder / f"{name}_half_{keeps_casts}{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    accumulation.SMALL = 500  # so that the small model has both kinds of parameters
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
