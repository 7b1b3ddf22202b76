"""Counted floating point operations."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of every matrix product, convolution and attention inside a `with` block, by torch's formulas.

    `FlopCounterMode` uses the same formulas, but its attribution to modules refuses `autograd.grad`, which training
    needs. Causal attention counts in full. The attention kernel of CPUs has no formula: there it is not counted.

    Args:
        formulas: further ones, by operator (`torch.ops.aten.mm`, say), or ones to use instead.
    """

    def __init__(self, formulas: Mapping[Any, Callable[..., int]] | None = None) -> None:
        super().__init__()
        self.total = 0
        self.formulas = {**flop_registry, **(formulas or {})}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := self.formulas.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result
