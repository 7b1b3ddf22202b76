"""Make a streaming step faster with the same results: captured CUDA graphs, and weights packed or cast once.

With few rows a matrix product is bound by reading the weights from memory, and every operation around it costs as much
as a small product. On a GPU a step is captured once and replayed without launching kernel by kernel. On a CPU, weights
reordered in advance to oneDNN's layout are read about twice as fast, and the activation, or the gain and residual,
after a product is fused into it.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_NUMBER_OF_GRAPHS = 64
Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass(frozen=True)
class CapturedGraph:
    """A graph with the buffers that it reads and writes."""

    graph: "torch.cuda.CUDAGraph"
    inputs: tuple[Tensor, ...]
    output: Tensor

    def __call__(self, *inputs: Tensor) -> Tensor:
        for buffer, value in zip(self.inputs, inputs, strict=True):
            buffer.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.output.clone()


class GraphedStep:
    """Runs a step; on CUDA one graph per combination of input shapes is captured on its first use.

    Args:
        step: `(input, num_frames) -> output`; `num_frames` is a tensor on CUDA and may be None, for all frames,
            elsewhere. The step keeps its state in buffers that never move, never waits for the device, and does not
            change the state if `num_frames` is 0, as in the calls that warm it up.
        enabled: False runs every step eagerly.

    Attributes:
        num_replays, num_eager: how often a graph was replayed, and how often a step ran without one.
    """

    def __init__(self, step: Callable[[Tensor, Tensor | None], Tensor], enabled: bool) -> None:
        self.step = step
        self.enabled = enabled
        self.num_replays = 0
        self.num_eager = 0
        self._graphs: dict[Shapes, CapturedGraph | None] = {}

    def __call__(self, value: Tensor, num_frames: Tensor | None) -> Tensor:
        if num_frames is not None and self.enabled and value.is_cuda:
            captured = self._graph(value, num_frames)
            if captured is not None:
                self.num_replays += 1
                return captured(value, num_frames)
        self.num_eager += 1
        return self.step(value, num_frames)

    def _graph(self, *inputs: Tensor) -> CapturedGraph | None:
        key = tuple((value.shape, value.dtype) for value in inputs)
        if key not in self._graphs:
            if len(self._graphs) >= LARGEST_NUMBER_OF_GRAPHS:
                return None
            try:
                self._graphs[key] = capture(self.step, *inputs)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph for steps of {key}, they run without: {error}", stacklevel=2)
                self._graphs[key] = None
        return self._graphs[key]


def capture(step: Callable[[Tensor, Tensor | None], Tensor], value: Tensor, num_frames: Tensor) -> CapturedGraph:
    """Warm up a step on copies of its inputs and capture it, without changing its state (see `GraphedStep`)."""
    inputs = (value.clone(), torch.zeros_like(num_frames))
    # The model's GPU need not be the current one. A capture on a stream of another GPU would be empty, and so would one
    # on torch's default stream for captures, which belongs to the GPU of the first capture of the process.
    with torch.cuda.device(value.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads of a server may allocate memory meanwhile, without an error there or here.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            output = step(*inputs)
    return CapturedGraph(graph, inputs, output)


FEWEST_ROWS = 2  # with a single row (matrix times vector) torch is as fast and has less overhead
LARGEST_ROWS = 64  # with more rows, packed and plain weights are equally fast
SMALLEST_PACKED = 2**17  # elements of a weight; smaller ones stay in the CPU cache anyway
LARGEST_PACKED = 2**30  # bytes of all weights of an encoder or decoder: packing makes a second copy


class LinearOps:
    """Applies linear layers and the operations that follow them, one after the other."""

    def __call__(self, linear: nn.Module, x: Tensor) -> Tensor:
        """Return `linear(x)` for [B, T, C]."""
        return linear(x)

    def gelu(self, linear: nn.Module, x: Tensor) -> Tensor:
        """Return `F.gelu(linear(x))`."""
        return F.gelu(self(linear, x))

    def add(self, linear: nn.Module, x: Tensor, residual: Tensor, gain: nn.Module) -> Tensor:
        """Return `gain(residual, linear(x))` with a `LayerScale`."""
        return gain(residual, self(linear, x))


class CastLinearOps(LinearOps):
    """`LinearOps` with copies of the current weights, cast once.

    Autocast would cast all weights again for every chunk of a stream, and keep a copy in every captured CUDA graph.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.weights: dict[nn.Module, Tensor] = {}
        for part in module.modules():
            if isinstance(part, nn.Linear) and part.bias is None and part.weight.device.type != "meta":
                self.weights[part] = part.weight.detach().to(dtype)

    def __call__(self, linear: nn.Module, x: Tensor) -> Tensor:
        weight = self.weights.get(linear)
        if weight is None or not torch.is_autocast_enabled(x.device.type):  # off for projections of a waveform
            return linear(x)
        return F.linear(x.to(weight.dtype), weight)


class PrepackedLinearOps(LinearOps):
    """`LinearOps` with packed copies of the current weights, used if that pays: float32, CPU, few rows, no gradient.

    Args:
        gains: by linear layer, the gain [D] of the `LayerScale` after it, which is multiplied into the packed weight.
    """

    def __init__(self, module: nn.Module, gains: Mapping[nn.Module, Tensor]) -> None:
        self.weights: dict[nn.Module, Tensor] = {}
        for linear in module.modules():
            if isinstance(linear, nn.Linear) and can_pack(linear):
                weight = linear.weight.detach()
                if linear in gains:
                    weight = weight * gains[linear].detach()[:, None]
                # In the layout for products with up to 8 rows.
                self.weights[linear] = torch.ops.mkldnn._reorder_linear_weight(weight, 8)

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
    """Return whether this torch can pack the layer's weight, and packing pays."""
    weight = linear.weight
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    pays = weight.numel() >= SMALLEST_PACKED and not torch.is_grad_enabled()
    return known and on_cpu and pays and linear.bias is None
