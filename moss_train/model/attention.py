"""Causal sliding-window self-attention, offline and streaming."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import StageState
from .rope import rotate


class MultiheadAttention(nn.Module):
    """Self-attention in which query i sees keys j with `0 <= i - j < window`; fused qkv, no biases.

    Parameter names (`in_projs.0.weight`, `out_projs.0.weight`) are those of the released weights.
    """

    def __init__(self, d_model: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.in_projs = nn.ModuleList([nn.Linear(d_model, 3 * d_model, bias=False)])
        self.out_projs = nn.ModuleList([nn.Linear(d_model, d_model, bias=False)])

    def forward(self, x: Tensor, rotations: tuple[Tensor, Tensor], step: "StreamStep | None" = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; with a `step`, T frames of streams whose past is in its state."""
        batch, frames, width = x.shape
        qkv = self.in_projs[0](x).view(batch, frames, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = rotate(query, *rotations), rotate(key, *rotations)
        if step is None:
            attended = windowed_attention(query, key, value, self.window)
        else:
            key, value = step.append(key, value)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=step.mask)
        return self.out_projs[0](attended.transpose(1, 2).reshape(batch, frames, width))


class StreamStep:
    """What the layers of a stage share while one chunk passes through it.

    Args:
        state: the stage's buffers, updated in place.
        frames: length of the chunk, padding included.
        num_frames: [B] valid frames of each item (at the front of the chunk), None when all are valid.
    """

    def __init__(self, state: StageState, frames: int, num_frames: Tensor | None) -> None:
        self.state = state
        self.mask = state.attention_mask(frames)
        self.kept = None if num_frames is None else state.kept_frames(num_frames)
        self.advance = frames if num_frames is None else num_frames
        self.layer = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Buffered and new keys and values of the current layer, see `StageState.append`."""
        return self.state.append(self.layer, keys, values, self.kept)

    def finish(self) -> None:
        """Move every stream on by the frames it brought."""
        self.state.position += self.advance


def windowed_attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Causal attention over the last `window` keys without a T x T mask; all tensors [B, H, T, D].

    A clip that fits the window is plain causal attention. A longer one is cut into blocks of `window` queries, each of
    which sees its own and the previous block under one [window, 2 * window] mask: memory grows linearly with T.
    """
    frames = query.shape[2]
    if frames <= window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    blocks = -(-frames // window)
    padding = (0, 0, 0, blocks * window - frames)
    query, key, value = (F.pad(x, padding).unflatten(2, (blocks, window)) for x in (query, key, value))
    first = F.scaled_dot_product_attention(query[:, :, 0], key[:, :, 0], value[:, :, 0], is_causal=True)
    # [B, H, blocks - 1, W, D] -> [B * (blocks - 1), H, W, D], so that one mask serves all blocks.
    rest = query[:, :, 1:].transpose(1, 2).flatten(0, 1)
    keys, values = (torch.cat((x[:, :, :-1], x[:, :, 1:]), dim=3).transpose(1, 2).flatten(0, 1) for x in (key, value))
    attended = F.scaled_dot_product_attention(rest, keys, values, attn_mask=block_mask(window, query.device))
    attended = attended.unflatten(0, (-1, blocks - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat((first, attended), dim=2)[:, :, :frames]


def block_mask(window: int, device: torch.device) -> Tensor:
    """[window, 2 * window] bool: which keys of the previous and the own block each query of a block sees."""
    query = torch.arange(window, device=device)[:, None]
    key = torch.arange(-window, window, device=device)[None, :]
    return (key <= query) & (query - key < window)
