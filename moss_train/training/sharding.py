"""Weights and gradients that are spread over the ranks: what one rank holds, and the whole."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor; of a sharded one all ranks have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(whole: Tensor, example: Tensor) -> Tensor:
    """A copy of a whole tensor, placed and sharded as an example of the same shape."""
    if not isinstance(example, DTensor):
        return whole.to(example.device, example.dtype, copy=True)
    moved = whole.to(example.device, example.dtype)
    return distribute_tensor(moved, example.device_mesh, example.placements, src_data_rank=None)
