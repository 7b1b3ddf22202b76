"""Shard tokenizer and text LM over the ranks (FSDP2, arXiv 2304.11277): less memory, more traffic.

Every rank holds its share of their weights, gradients and moments. A layer's weights are gathered before they are used,
in the forward and again in the backward pass, and its gradients are summed in every micro-batch, so that no rank keeps
all of either. Quantizer and discriminators are small and stay whole on all ranks.

All of this is collective: every rank has to pass every network equally often in an update.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a rank holds a share of this tensor only."""
    return isinstance(tensor, DTensor)


def gather_to_rank0(tensor: Tensor) -> Tensor | None:
    """Return a tensor as it is, or of a sharded one the whole in the memory of the first rank's host, None on the
    others.

    Tensor by tensor no rank holds all of them on its device; all ranks have to call it.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else None


def local_tensor(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distribute_like(full: Tensor, example: Tensor) -> Tensor:
    """Return a copy of a whole tensor, placed and sharded as an example of the same shape."""
    if not isinstance(example, DTensor):
        return full.to(example.device, example.dtype, copy=True)
    moved = full.to(example.device, example.dtype)
    return distribute_tensor(moved, example.device_mesh, example.placements, src_data_rank=None)


class FSDPUnits:
    """Networks that are sharded from now on: layer by layer, and what else a network has as one more unit.

    Args:
        networks: called as modules, each on its own.
        mesh: one-dimensional, the ranks that share.
        reduce_dtype: of gradients between ranks, by default float32.
        gather_dtype: in which the linear weights of layers are gathered, by default float32. Where autocast multiplies
            in bfloat16 anyway, gathering that is the same to the last bit and half the traffic.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        mesh: DeviceMesh,
        reduce_dtype: torch.dtype | None,
        gather_dtype: torch.dtype | None = None,
    ) -> None:
        policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
        half = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=reduce_dtype or torch.float32)
        self.units: list[FSDPModule] = []
        for network in networks:
            units: list[list[Any]] = [[network]]
            for layer in layers_of(network):
                linears: list[nn.Module] = (
                    [part for part in layer.modules() if isinstance(part, nn.Linear)] if gather_dtype else []
                )
                if linears:
                    fully_shard(linears, mesh=mesh, reshard_after_forward=True, mp_policy=half)
                fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
                units.append([layer, *linears[:1]])
            fully_shard(network, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            # The next unit is gathered while one computes: the network's own weights first, then its layers, and
            # backwards. The first linear layer stands for all of them where they are gathered in another precision.
            # The order that FSDP2 notes by itself would be upset by passes of a validation.
            for parts, following in pairwise(units):
                parts[0].set_modules_to_forward_prefetch(following)
                following[0].set_modules_to_backward_prefetch(parts)
            units[0][0].set_modules_to_backward_prefetch(units[-1])
            self.units += [part for unit in units for part in unit]
        for unit in self.units:
            # Terms are sums over clips divided by counts of all ranks, so gradients add up.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Within it every rank has all weights, for work without gradients, for which ranks need not keep step."""
        for unit in self.units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in self.units:
                unit.set_reshard_after_forward(True, recurse=False)
                unit.reshard()


def layers_of(network: nn.Module) -> list[nn.Module]:
    """Return the layers of a transformer: what its lists called `layers` hold."""
    lists = [part for name, part in network.named_modules() if name.rpartition(".")[2] == "layers"]
    return [layer for part in lists if isinstance(part, nn.ModuleList) for layer in part]


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's processes and device mesh for FSDP2; `CatModule.configure_model` shards.

    Checkpoints hold whole tensors under the names of one process, so that a run can continue with other processes or
    another strategy. Lightning's own collection would step an optimizer without state to give it one.
    """

    def __init__(self, num_processes: int, timeout: timedelta) -> None:
        super().__init__(num_processes, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are restored by `load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """Connect the processes, which `start_processes` does before there is a module; then make the mesh."""
        if self.lightning_module is None:
            self._setup_distributed()
        else:
            super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights on rank 0, nothing of use elsewhere; all ranks have to call it."""
        assert self.lightning_module is not None
        return {name: gather_to_rank0(tensor) for name, tensor in self.lightning_module.state_dict().items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the whole moments on rank 0, nothing of use elsewhere; all ranks have to call it."""
        state = optimizer.state_dict()
        gathered = {
            place: {name: gather_to_rank0(value) for name, value in values.items()}
            for place, values in state["state"].items()
        }
        return state | {"state": gathered}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read by every rank, through the run's own plugin."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's share of whole weights."""
        assert self.lightning_module is not None
        examples = self.lightning_module.state_dict()
        weights = {name: distribute_like(value, examples[name]) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(weights, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's share of whole moments."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                place: {name: shard_moment(value, parameters[place]) for name, value in values.items()}
                for place, values in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": moments})


def shard_moment(value: Any, parameter: nn.Parameter) -> Any:
    """Return a rank's share of what an optimizer keeps for a parameter; the count of steps is no tensor of its
    shape.
    """
    is_moment = isinstance(value, Tensor) and value.ndim > 0 and value.shape == parameter.shape
    return distribute_like(value, parameter.detach()) if is_moment else value
