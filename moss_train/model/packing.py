"""Weights in oneDNN's own order, for the few rows of a streaming step on a CPU.

With fewer than about 64 rows a matrix product waits for the weights to arrive from memory. Weights that were ordered
beforehand are read about twice as fast as by torch's general routine.
"""

import torch
from torch import Tensor, nn

LARGEST_ROWS = 64  # beyond, both are equally fast
LARGEST_PACKED = 2**30  # bytes of an encoder's or decoder's weights: the packed ones are a second copy


class PackedLinears:
    """Applies linear layers, packed as they are now where that pays: float32, CPU, few rows, no gradient."""

    def __init__(self, module: nn.Module) -> None:
        linears = [linear for linear in module.modules() if isinstance(linear, nn.Linear)]
        self.weights: dict[nn.Module, Tensor] = {linear: pack(linear.weight) for linear in linears if can_pack(linear)}

    def __call__(self, linear: nn.Module, x: Tensor) -> Tensor:
        """`linear(x)` for [B, T, C]."""
        weight = self.weights.get(linear)
        few = x.shape[0] * x.shape[1] <= LARGEST_ROWS
        if weight is None or not few or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return linear(x)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def can_pack(linear: nn.Linear) -> bool:
    """Whether this torch and the layer's weight allow it."""
    weight = linear.weight
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return known and on_cpu and linear.bias is None and not torch.is_grad_enabled()


def pack(weight: Tensor) -> Tensor:
    """Copy of a weight [D, C] in the order for products with up to 8 rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 8)
