"""Compile the parts of a module with a backend that counts graphs, and calls of parts in which no graph ran."""

from collections.abc import Callable
from typing import Any

import torch

from moss_train.training import CatModule
from moss_train.training.run.optimizations import compile_blocks, compiled_parts


class CompiledCalls:
    """Counts of graphs and calls.

    Attributes:
        graphs: number of compiled graphs so far.
        calls: number of calls of all parts.
        eager_calls: number of these calls in which no graph ran.
    """

    def __init__(self, module: CatModule, backend: str) -> None:
        self.graphs = self.calls = self.eager_calls = self.runs = 0
        compiler = torch._dynamo.lookup_backend(backend)

        def counting(graph: Any, inputs: Any) -> Callable[..., Any]:
            self.graphs += 1
            run = compiler(graph, inputs)

            def counted(*args: Any) -> Any:
                self.runs += 1
                return run(*args)

            return counted

        name = f"{backend}_{id(self)}"
        torch._dynamo.register_backend(counting, name=name)
        compile_blocks(module, name)
        runs_before = []

        def after(*_: Any) -> None:
            self.calls += 1
            self.eager_calls += self.runs == runs_before.pop()

        for part in compiled_parts(module):
            part.register_forward_pre_hook(lambda *_: runs_before.append(self.runs))
            part.register_forward_hook(after)
