"""Causal sliding-window self-attention, offline and streaming."""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import StreamChunk
from .rope import Rotation, rotate, rotate_in_place

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

HAS_WINDOW_KERNEL = varlen_attn is not None and "window_size" in inspect.signature(varlen_attn).parameters

LARGEST_BLOCK = 256  # queries per call beyond the window; all see window - 1 + 256 keys, so more would waste work


class MultiheadAttention(nn.Module):
    """Self-attention in which query i sees keys j with `0 <= i - j < window`; fused qkv, no biases.

    Parameter names (`in_projs.0.weight`, `out_projs.0.weight`) are those of the released weights.

    Args:
        flash: use the windowed FlashAttention kernel where device and dtype have it.
    """

    def __init__(self, d_model: int, num_heads: int, window: int, flash: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.flash = flash
        self.in_projs = nn.ModuleList([nn.Linear(d_model, 3 * d_model, bias=False)])
        self.out_projs = nn.ModuleList([nn.Linear(d_model, d_model, bias=False)])

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """[B, T, D] -> [B, T, D], whole clips from their first frame."""
        batch, frames, width = x.shape
        heads = self.num_heads
        qkv = self.in_projs[0](x).view(batch, frames, 3 * heads, width // heads)
        rotated = rotate(qkv[:, :, : 2 * heads], rotation)
        query, key, value = rotated[:, :, :heads], rotated[:, :, heads:], qkv[:, :, 2 * heads :]
        if frames > self.window and self.flash and has_window_kernel(query):
            attended = flash_attention(query, key, value, self.window)
        else:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            attended = windowed_attention(query, key, value, self.window).transpose(1, 2)
        return self.out_projs[0](attended.reshape(batch, frames, width))

    def attend(self, x: Tensor, rotation: Rotation, layer: int, chunk: StreamChunk) -> Tensor:
        """[B, T, D] -> [B, T, D] before the output projection, for streams whose past is in the ring of `layer`."""
        batch, frames, width = x.shape
        heads = self.num_heads
        qkv = chunk.state.linears(self.in_projs[0], x).view(batch, frames, 3 * heads, width // heads)
        rotate_in_place(qkv[:, :, : 2 * heads], rotation)
        attended = streaming_attention(qkv[:, :, :heads], qkv[:, :, heads:], layer, chunk)
        return attended.reshape(batch, frames, width)


def streaming_attention(query: Tensor, key_value: Tensor, layer: int, chunk: StreamChunk) -> Tensor:
    """Attention of a chunk over the streams' past and itself. Writes the ring of `layer`.

    Args:
        query: [B, T, H, D].
        key_value: [B, T, 2 * H, D], the keys' heads and then the values'.
    """
    ring, heads = chunk.state.rings[layer], query.shape[2]
    parts = []
    for step in chunk.steps:
        seen = step.write(ring, key_value)
        queries = query[:, step.start : step.stop].transpose(1, 2).to(ring.dtype)
        parts.append(F.scaled_dot_product_attention(queries, seen[:, :heads], seen[:, heads:], attn_mask=step.mask))
    attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return attended.transpose(1, 2)


def windowed_attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Causal attention over the last `window` keys without a T x T mask; all tensors [B, H, T, D].

    A clip that fits the window is plain causal attention, and so are the first `window` frames of a longer one. The
    rest goes in blocks of queries that share one mask: time and memory grow linearly with T.
    """
    frames = query.shape[2]
    head = slice(0, min(frames, window))
    parts = [F.scaled_dot_product_attention(query[:, :, head], key[:, :, head], value[:, :, head], is_causal=True)]
    if frames <= window:
        return parts[0]
    block = max(1, min(LARGEST_BLOCK, window // 2))
    mask = block_mask(block, window, query.device)
    for start in range(window, frames, block):
        stop = min(start + block, frames)
        past = slice(start - window + 1, stop)
        visible = mask[: stop - start, : window - 1 + stop - start]
        parts.append(
            F.scaled_dot_product_attention(query[:, :, start:stop], key[:, :, past], value[:, :, past], visible)
        )
    return torch.cat(parts, dim=2)


def block_mask(block: int, window: int, device: torch.device) -> Tensor:
    """[block, window - 1 + block] bool: which of the preceding and own keys each query of a block sees."""
    query = torch.arange(block, device=device)[:, None]
    key = torch.arange(1 - window, block, device=device)[None, :]
    return (key <= query) & (query - key < window)


def has_window_kernel(query: Tensor) -> bool:
    """Whether torch has windowed FlashAttention for such tensors: half precision on CUDA."""
    if not HAS_WINDOW_KERNEL or not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def flash_attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """`windowed_attention` by one kernel; all tensors [B, T, H, D]."""
    batch, frames = query.shape[:2]
    starts = torch.arange(0, (batch + 1) * frames, frames, dtype=torch.int32, device=query.device)
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    # The kernel counts the keys before the query, we count the query too.
    attended = varlen_attn(query, key, value, starts, starts, frames, frames, window_size=(window - 1, 0))
    assert isinstance(attended, Tensor)
    return attended.unflatten(0, (batch, frames))
