"""Count floating-point operations of tensor operations as they run: the one convention of log, estimate and benchmarks.

An addition and a multiplication are two operations. Attention counts the pairs of query and key that it needs: half of
the square where it is causal, within its window where it has one. What a fused backward pass computes again is not
counted, as usual for the utilisation of a model (arXiv 2204.02311).
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

with suppress(ImportError):
    import torch.nn.attention.varlen  # defines its operators

_KERNELS = [f"_scaled_dot_product_{kernel}_attention" for kernel in ("flash", "efficient", "cudnn")]
_KERNELS.append("_scaled_dot_product_flash_attention_for_cpu")
ATTENTION = {
    getattr(operators, f"{name}{suffix}"): factor
    for operators, names in ((torch.ops.aten, _KERNELS), (torch.ops.torch_attn, ["_varlen_attn"]))
    for name in names
    for suffix, factor in (("", 1), ("_backward", 2))
    if hasattr(operators, f"{name}{suffix}")
}
"""Operators of fused attention that this torch has, and their operations in those of the forward pass."""


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of every matrix product, convolution and attention inside a `with` block.

    Products and convolutions count by torch's formulas. `FlopCounterMode` uses the same, but its attribution to modules
    refuses `autograd.grad`, which training needs, and it knows neither causal nor windowed attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operator = func._overloadpacket
        if operator in ATTENTION:
            names = (argument.name for argument in func._schema.arguments)
            self.total += ATTENTION[operator] * attention(dict(zip(names, args, strict=False)) | (kwargs or {}))
        elif operator in flop_registry:
            self.total += flop_registry[operator](*args, **(kwargs or {}), out_val=result)
        return result


def attention(given: Mapping[str, Any]) -> int:
    """Return the FLOPs of the two products of attention, from the arguments of its kernel by name.

    Query, key and value are [B, H, T, D], [B, G, S, D] and [B, G, S, E], where H / G heads share keys; or clips in a
    row, [B * T, H, D], which are taken to have one length. A square mask is a causal one: transformers writes it out
    for tensors without values.
    """
    query, key, value = (given[name] for name in ("query", "key", "value"))
    is_causal, window = given.get("is_causal", False), None
    if "cu_seq_q" in given:
        queries, keys = given["max_q"], given["max_k"]
        num_heads = query.shape[0] * query.shape[1] // queries  # of all clips
        left, right = given.get("window_size") or (-1, -1)
        is_causal, window = is_causal or right == 0, left + 1 if left >= 0 else None
    else:
        queries, keys = query.shape[2], key.shape[2]
        num_heads = query.shape[0] * query.shape[1]
        mask = given.get("attn_mask") if given.get("attn_mask") is not None else given.get("attn_bias")
        is_causal = is_causal or (mask is not None and queries == keys)
    return 2 * num_heads * attended_pairs(queries, keys, is_causal, window) * (query.shape[-1] + value.shape[-1])


def attended_pairs(queries: int, keys: int, is_causal: bool, window: int | None = None) -> int:
    """Return how many keys all queries of a clip see together; at most `window` each."""
    seen = keys if window is None else min(window, keys)
    if not is_causal or queries != keys:
        return queries * seen
    return seen * (seen + 1) // 2 + (queries - seen) * seen
