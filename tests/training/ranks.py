"""One of several processes that compute the gradients of one update together; `test_distributed` starts them."""

import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moss_train.batch import UpdateBatch
from moss_train.training import CatModule
from moss_train.training.distributed.fsdp import full_tensor
from moss_train.training.updates import Side, compute_terms, reduce


def gradients(
    arguments: Mapping[str, Any], batch: UpdateBatch, number: int, mesh: DeviceMesh | None = None
) -> tuple[dict, dict]:
    """Gradients of update `number` by parameter name, and its numbers; summed over the ranks when there are some.

    Given a mesh the large networks are sharded over it.
    """
    module = CatModule(**arguments)
    module._device_mesh = mesh
    module.configure_model()
    assert (module.shards is None) == (mesh is None)
    module.manual_backward = lambda loss, **options: loss.backward(**options)  # outside a Trainer
    module.contributions = {"clips": float(sum(micro.num_clips for micro in batch.micro_batches))}
    terms = compute_terms(module, batch, module.schedule.at(number))
    sides = [Side("generator", None, 0.0, {name: list(part.parameters()) for name, part in module.parts().items()})]
    if module.schedule.at(number).stage.adversarial:
        sides.append(Side("discriminators", None, 0.0, {"discriminators": module.discriminator_parameters()}))
    numbers = reduce(module, sides, terms, batch)
    found = {name: full_tensor(p.grad) for name, p in module.named_parameters() if p.grad is not None}
    return found, numbers


def main(folder: Path, rank: int, world_size: int) -> None:
    """Read the work of this rank, do it, and store the result of each case."""
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=120), world_size=world_size, rank=rank)
    work = torch.load(folder / "work.pt", weights_only=False)
    sharded = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    for name, mesh in (("replicated", None), ("sharded", sharded)):
        results = [gradients(work["arguments"], batches[rank], number, mesh) for batches, number in work["cases"]]
        torch.save(results, folder / f"{name}{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
