"""Capture a streaming step once as a CUDA graph and replay it without launching kernel by kernel."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """Runs a step; on CUDA one graph per combination of input shapes is captured when it first comes up.

    Args:
        step: `(input, num_frames) -> output`; on CUDA `num_frames` is a tensor, elsewhere None says all. Its state lies
            in buffers that stay where they are, it never waits for the device, and with `num_frames` = 0 it leaves the
            state as it is: that is how it is warmed up.
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
    """Warm up a step on copies of its inputs and capture it; the state stays as it is, see `GraphedStep`."""
    inputs = (value.clone(), torch.zeros_like(num_frames))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Of a server's other threads: what they allocate meanwhile is neither an error of theirs nor of the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = step(*inputs)
    return CapturedGraph(graph, inputs, output)
