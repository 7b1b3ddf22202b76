"""Apply the linear layers of a stage while it streams, with weights packed or cast once.

With few rows a matrix product waits for the weights to arrive from memory, and every operation around it costs as much
as a small product. On a CPU, weights that were ordered beforehand in oneDNN's way are read about twice as fast, and the
activation or the gain and residual behind a product join it.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_ROWS = 2  # a single row is a matrix times a vector, which torch does as fast and with less overhead
LARGEST_ROWS = 64  # beyond, both are equally fast
SMALLEST_PACKED = 2**17  # elements of a weight; smaller ones stay in the cache
LARGEST_PACKED = 2**30  # bytes of an encoder's or decoder's weights: the packed ones are a second copy


class LinearOps:
    """Applies linear layers, each with what follows it, one operation after the other."""

    def __call__(self, linear: nn.Module, x: Tensor) -> Tensor:
        """`linear(x)` for [B, T, C]."""
        return linear(x)

    def gelu(self, linear: nn.Module, x: Tensor) -> Tensor:
        """`F.gelu(linear(x))`."""
        return F.gelu(self(linear, x))

    def add(self, linear: nn.Module, x: Tensor, residual: Tensor, gain: nn.Module) -> Tensor:
        """`gain(residual, linear(x))` with a `LayerScale`."""
        return gain(residual, self(linear, x))


class CastLinearOps(LinearOps):
    """The same with weights that were cast once, as they are now.

    Autocast would cast all of them again for every chunk of a stream, and keep a copy in every captured CUDA graph.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.weights: dict[nn.Module, Tensor] = {}
        for part in module.modules():
            if isinstance(part, nn.Linear) and part.bias is None and part.weight.device.type != "meta":
                self.weights[part] = part.weight.detach().to(dtype)

    def __call__(self, linear: nn.Module, x: Tensor) -> Tensor:
        weight = self.weights.get(linear)
        if weight is None or not torch.is_autocast_enabled(x.device.type):  # as for projections of a waveform
            return linear(x)
        return F.linear(x.to(weight.dtype), weight)


class PrepackedLinearOps(LinearOps):
    """The same with weights that are packed, as they are now, where that pays: float32, CPU, few rows, no gradient.

    Args:
        gains: the gain [D] of the `LayerScale` behind a layer, which is multiplied into the packed weight.
    """

    def __init__(self, module: nn.Module, gains: Mapping[nn.Module, Tensor]) -> None:
        linears = [linear for linear in module.modules() if isinstance(linear, nn.Linear) and can_pack(linear)]
        self.weights: dict[nn.Module, Tensor] = {linear: pack(linear, gains.get(linear)) for linear in linears}

    def __call__(self, linear: nn.Module, x: Tensor) -> Tensor:
        if not self._applies(linear, x):
            return super().__call__(linear, x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weights[linear], None, "none", [], "")

    def gelu(self, linear: nn.Module, x: Tensor) -> Tensor:
        if not self._applies(linear, x):
            return super().gelu(linear, x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weights[linear], None, "gelu", [], "none")

    def add(self, linear: nn.Module, x: Tensor, residual: Tensor, gain: nn.Module) -> Tensor:
        if not self._applies(linear, x):
            return super().add(linear, x, residual, gain)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weights[linear], None, "add")

    def _applies(self, linear: nn.Module, x: Tensor) -> bool:
        few = FEWEST_ROWS <= x.shape[0] * x.shape[1] <= LARGEST_ROWS
        return few and linear in self.weights and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def can_pack(linear: nn.Linear) -> bool:
    """Whether this torch and the layer's weight allow it, and it pays."""
    weight = linear.weight
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    pays = weight.numel() >= SMALLEST_PACKED and not torch.is_grad_enabled()
    return known and on_cpu and pays and linear.bias is None


def pack(linear: nn.Linear, gain: Tensor | None) -> Tensor:
    """Copy of a weight [D, C], times a gain [D], in the order for products with up to 8 rows."""
    weight = linear.weight.detach()
    if gain is not None:
        weight = weight * gain.detach()[:, None]
    return torch.ops.mkldnn._reorder_linear_weight(weight, 8)
