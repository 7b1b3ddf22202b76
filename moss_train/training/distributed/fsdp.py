"""Shard tokenizer and text LM over the ranks (FSDP2, arXiv 2304.11277): less memory, more traffic.

Every rank holds a shard of their weights, gradients and moments. A layer's weights are gathered before they are used,
in the forward and again in the backward pass, and its gradients are reduced in every micro-batch, so that no rank keeps
all of either. Quantizer and discriminators are small and stay whole on all ranks.

These are collective operations: in an update, every rank has to run every network equally often.
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
    """Return whether each rank holds only a shard of this tensor."""
    return isinstance(tensor, DTensor)


def gather_to_rank0(tensor: Tensor) -> Tensor | None:
    """Return an unsharded tensor as it is; of a sharded one, the whole in host memory on rank 0, and None elsewhere.

    All ranks have to call it. It takes a single tensor, so that no device ever holds all whole tensors at once.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else None


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor (all of an unsharded one), without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distribute_like(full: Tensor, example: Tensor) -> Tensor:
    """Return a copy of a whole tensor, placed and sharded like an example of the same shape."""
    if not isinstance(example, DTensor):
        return full.to(example.device, example.dtype, copy=True)
    moved = full.to(example.device, example.dtype)
    return distribute_tensor(moved, example.device_mesh, example.placements, src_data_rank=None)


class FSDPUnits:
    """Shards networks in place: every layer is a unit, and the remaining weights of a network are one more unit.

    Args:
        networks: networks that are each called as a module of their own.
        mesh: one-dimensional mesh of the ranks to shard over.
        reduce_dtype: dtype in which gradients are reduced between ranks; None is float32.
        gather_dtype: dtype in which the linear weights of layers are gathered; None is float32. Where autocast computes
            in bfloat16 anyway, gathering in bfloat16 gives the same result to the last bit with half the traffic.
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
            # While one unit computes, the next one is gathered: the network's own weights first, then its layers, and
            # in reverse order in the backward pass. Where linear layers are gathered in another precision, the first
            # one stands for all of its unit. The order is set here because validation would upset the one that FSDP2
            # records.
            for parts, following in pairwise(units):
                parts[0].set_modules_to_forward_prefetch(following)
                following[0].set_modules_to_backward_prefetch(parts)
            units[0][0].set_modules_to_backward_prefetch(units[-1])
            self.units += [part for unit in units for part in unit]
        for unit in self.units:
            # Terms are sums over clips divided by counts over all ranks, so gradients add up without an average.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Gather all weights on every rank inside the `with` block, where ranks may run networks independently.

        It is for work without gradients.
        """
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
    """Return the transformer layers of a network: the items of its module lists called `layers`."""
    lists = [part for name, part in network.named_modules() if name.rpartition(".")[2] == "layers"]
    return [layer for part in lists if isinstance(part, nn.ModuleList) for layer in part]


class FSDP2Strategy(ModelParallelStrategy):
    """Sets up Lightning's processes and device mesh for FSDP2; `CatModule.configure_model` shards the networks.

    Checkpoints hold whole tensors under the same names as with one process, so that a run can continue with another
    number of processes or another strategy. State is gathered here because Lightning's own method would step an
    optimizer that has no state yet, in order to create it.
    """

    def __init__(self, num_processes: int, timeout: timedelta) -> None:
        super().__init__(num_processes, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning restores optimizers: yes, with `load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """Connect the processes; called again once there is a module, also create the device mesh.

        `start_processes` makes the first call.
        """
        if self.lightning_module is None:
            self._setup_distributed()
        else:
            super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights on rank 0 and None for sharded ones elsewhere; all ranks have to call it."""
        assert self.lightning_module is not None
        return {name: gather_to_rank0(tensor) for name, tensor in self.lightning_module.state_dict().items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the whole moments on rank 0 and None for sharded ones elsewhere; all ranks have to call it."""
        state = optimizer.state_dict()
        gathered = {
            place: {name: gather_to_rank0(value) for name, value in values.items()}
            for place, values in state["state"].items()
        }
        return state | {"state": gathered}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint on every rank, with the run's own plugin."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's shards of whole weights."""
        assert self.lightning_module is not None
        examples = self.lightning_module.state_dict()
        weights = {name: distribute_like(value, examples[name]) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(weights, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's shards of whole moments."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                place: {name: shard_moment(value, parameters[place]) for name, value in values.items()}
                for place, values in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": moments})


def shard_moment(value: Any, parameter: nn.Parameter) -> Any:
    """Return this rank's shard of an optimizer's state value; one of another shape (the step count) is returned as it
    is.
    """
    is_moment = isinstance(value, Tensor) and value.ndim > 0 and value.shape == parameter.shape
    return distribute_like(value, parameter.detach()) if is_moment else value
