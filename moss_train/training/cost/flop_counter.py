"""Count floating-point operations of tensor operations as they run."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

with suppress(ImportError):
    import torch.nn.attention.varlen  # defines its operators


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of every matrix product, convolution and attention inside a `with` block, by torch's formulas.

    `FlopCounterMode` uses the same formulas, but its attribution to modules refuses `autograd.grad`, which training
    needs. Attention has formulas of our own: torch 2.11 refuses keys with fewer heads and knows none for the windowed
    kernel. Causal attention counts in full, within its window. The attention kernel of CPUs is not counted.

    Args:
        formulas: further ones, by operator (`torch.ops.aten.mm`, say), or ones to use instead.
    """

    def __init__(self, formulas: Mapping[Any, Callable[..., int]] | None = None) -> None:
        super().__init__()
        self.total = 0
        self.formulas = {**flop_registry, **ATTENTION, **(formulas or {})}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := self.formulas.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two products of [B, H, T, D] with keys and values [B, G, S, D], each used by H / G heads."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[2] * (width + value.shape[3])


def attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Five products, one of them done again."""
    return attention(query, key, value) * 5 // 2


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Sequence[int] | None = None,
    *_: Any,
    **__: Any,
) -> int:
    """Clips of one length in a row, [B * T, H, D]: every query sees a whole window, or a whole clip if that is less."""
    seen = max_k if window_size is None or window_size[0] < 0 else min(max_k, window_size[0] + 1)
    return 4 * query.numel() * seen


def varlen_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: Sequence[int] | None = None,
    **_: Any,
) -> int:
    """Five products, one of them done again."""
    forward = varlen_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale, window_size)
    return forward * 5 // 2


def operators(namespace: Any, names: Sequence[str]) -> list[Any]:
    """Those operators that this torch has."""
    return [getattr(namespace, name) for name in names if hasattr(namespace, name)]


FUSED = [f"_scaled_dot_product_{kernel}_attention" for kernel in ("flash", "efficient", "cudnn")]
ATTENTION: dict[Any, Callable[..., int]] = {
    **dict.fromkeys(operators(torch.ops.aten, FUSED), attention),
    **dict.fromkeys(operators(torch.ops.aten, [f"{name}_backward" for name in FUSED]), attention_backward),
    **dict.fromkeys(operators(torch.ops.torch_attn, ["_varlen_attn"]), varlen_attention),
    **dict.fromkeys(operators(torch.ops.torch_attn, ["_varlen_attn_backward"]), varlen_attention_backward),
}
"""Formulas of attention by operator, on CUDA."""
