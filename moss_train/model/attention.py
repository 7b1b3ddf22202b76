"""Causal sliding-window self-attention with rotary position embedding, offline and streaming."""

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kv_cache import StreamChunk

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

HAS_WINDOW_KERNEL = varlen_attn is not None and "window_size" in inspect.signature(varlen_attn).parameters

LARGEST_BLOCK = 256  # queries per call after the first window; a larger block would score more masked keys per query


class Rotation(NamedTuple):
    """Rotary position embedding with interleaved pairs (RoFormer, arXiv 2104.09864).

    Holds the angles of frames: cosine and sine [B, T, 1, D / 2] float32 (B may be 1), and both as one complex `phase`.

    A complex product takes one pass over the data, the real form seven. The real form is used by compilers, and on MPS,
    where `phase` is None.
    """

    cosine: Tensor
    sine: Tensor
    phase: Tensor | None


def rotation(positions: Tensor, head_dim: int, max_period: float) -> Rotation:
    """Return the rotation of every position [B, T] int64 (B may be 1), computed anew in every call.

    It is not kept in a buffer, because transformers builds models on the meta device, where non-persistent buffers lose
    their content. Angles are computed in float64, so a stream may run for years; in float32 they would be wrong by
    0.006 rad after an hour at 100 Hz. (Apple's MPS has no float64 and keeps that limit.)
    """
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / -head_dim
    angles = positions.to(dtype)[:, :, None, None] * max_period**exponent
    cosine, sine = torch.cos(angles).float(), torch.sin(angles).float()
    return Rotation(cosine, sine, None if positions.device.type == "mps" else torch.complex(cosine, sine))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair (x[2i], x[2i + 1]) of [B, T, H, D] by its angle in float32; returns the dtype of `x`."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if rotation.phase is not None and not torch.compiler.is_compiling():
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * rotation.phase)
    else:
        even, odd = pairs.unbind(-1)
        cosine, sine = rotation.cosine, rotation.sine
        rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def rotate_in_place(x: Tensor, rotation: Rotation) -> None:
    """Apply `rotate` to `x` in place."""
    if rotation.phase is None or x.dtype != torch.float32 or torch.compiler.is_compiling():
        x.copy_(rotate(x, rotation))
    else:
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(rotation.phase)


class MultiheadAttention(nn.Module):
    """Self-attention in which query i attends to keys j with `0 <= i - j < window`; fused qkv, no biases.

    Parameter names (`in_projs.0.weight`, `out_projs.0.weight`) are those of the released weights.

    Attributes:
        flash: use the windowed FlashAttention kernel where device and dtype support it.
    """

    def __init__(self, d_model: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.flash = True
        self.blockwise_attention = windowed_attention
        self.in_projs = nn.ModuleList([nn.Linear(d_model, 3 * d_model, bias=False)])
        self.out_projs = nn.ModuleList([nn.Linear(d_model, d_model, bias=False)])

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Map [B, T, D] -> [B, T, D] for whole clips, from their first frame on."""
        batch, frames, width = x.shape
        heads = self.num_heads
        qkv = self.in_projs[0](x).view(batch, frames, 3 * heads, width // heads)
        rotated = rotate(qkv[:, :, : 2 * heads], rotation)
        query, key, value = rotated[:, :, :heads], rotated[:, :, heads:], qkv[:, :, 2 * heads :]
        if frames > self.window and self.flash and has_window_kernel(query):
            attended = flash_attention(query, key, value, self.window)
        else:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            if frames <= self.window:
                attended = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
            else:
                attended = self.blockwise_attention(query, key, value, self.window).transpose(1, 2)
        return self.out_projs[0](attended.reshape(batch, frames, width))

    def attend(self, x: Tensor, rotation: Rotation, layer: int, chunk: StreamChunk) -> Tensor:
        """Map a chunk [B, T, D] -> [B, T, D], with attention to itself and the streams' past; no output projection.

        The past is in the KV cache of `layer`, a ring buffer to which the chunk's keys and values are written.
        """
        batch, frames, width = x.shape
        heads, ring = self.num_heads, chunk.state.rings[layer]
        qkv = chunk.state.linears(self.in_projs[0], x).view(batch, frames, 3 * heads, width // heads)
        rotate_in_place(qkv[:, :, : 2 * heads], rotation)
        parts = []
        for step in chunk.steps:
            step = step.to(ring.device)
            seen = step.write(ring, qkv[:, :, heads:])
            queries = qkv[:, step.start : step.stop, :heads].transpose(1, 2).to(ring.dtype)
            parts.append(F.scaled_dot_product_attention(queries, seen[:, :heads], seen[:, heads:], attn_mask=step.mask))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return attended.transpose(1, 2).reshape(batch, frames, width)


def windowed_attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Return the causal attention over the last `window` keys without a T x T mask; all tensors [B, H, T, D].

    For a clip that fits the window this is plain causal attention, as it is for the first `window` frames of a longer
    one. The rest is computed in blocks of queries that share one mask: time and memory grow linearly with T.
    """
    frames = query.shape[2]
    head = slice(0, min(frames, window))
    parts = [F.scaled_dot_product_attention(query[:, :, head], key[:, :, head], value[:, :, head], is_causal=True)]
    if frames <= window:
        return parts[0]
    block = max(1, min(LARGEST_BLOCK, window // 2))
    # Which keys each query of a block attends to, among the window - 1 keys before the block and the block's own.
    distance = torch.arange(block, device=query.device)[:, None] - torch.arange(1 - window, block, device=query.device)
    mask = (distance >= 0) & (distance < window)
    for start in range(window, frames, block):
        stop = min(start + block, frames)
        past = slice(start - window + 1, stop)
        visible = mask[: stop - start, : window - 1 + stop - start]
        parts.append(
            F.scaled_dot_product_attention(query[:, :, start:stop], key[:, :, past], value[:, :, past], visible)
        )
    return torch.cat(parts, dim=2)


def has_window_kernel(query: Tensor) -> bool:
    """Return whether torch has windowed FlashAttention for such tensors: half precision on a GPU from Ampere on."""
    if not HAS_WINDOW_KERNEL or not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 and runs_flash_attention(query.device)


@torch.compiler.assume_constant_result
def runs_flash_attention(device: torch.device) -> bool:
    """Return whether a GPU is recent enough for FlashAttention; True without any GPU, for tensors without data."""
    return not torch.cuda.is_available() or torch.cuda.get_device_properties(device).major >= 8


def flash_attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Compute `windowed_attention` in one kernel; all tensors [B, T, H, D]."""
    batch, frames = query.shape[:2]
    starts = torch.arange(0, (batch + 1) * frames, frames, dtype=torch.int32, device=query.device)
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    # The kernel's window counts only the keys before the query; ours also counts the query itself.
    attended = varlen_attn(query, key, value, starts, starts, frames, frames, window_size=(window - 1, 0))
    assert isinstance(attended, Tensor)
    return attended.unflatten(0, (batch, frames))
