"""Streaming state of a transformer stage: rings of keys and values that are passed in and written in place.

Frame p of a stream lies in slot `p % capacity`. The capacity is `window - 1` plus the longest step, so that a step
never overwrites keys that its own first queries still need. (A ring of exactly `window` slots does, for every step of
two or more frames.) Which slots a query sees follows from positions alone, so nothing is ever moved or cleared.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def apply_module(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`."""
    return module(x)


@dataclass
class StageState:
    """State of one transformer stage for a batch of streams.

    Attributes:
        position: [B] int64, frames seen so far by each stream; zero makes the item's slots invisible.
        keys, values: per layer [B, capacity + 1, H, D]; the last slot takes frames that are padding.
        window: frames a query may look back on, itself included.
        linear: applies the stage's linear layers.
    """

    position: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    window: int
    linear: Callable[[nn.Module, Tensor], Tensor] = apply_module

    @property
    def capacity(self) -> int:
        """Slots of the ring."""
        return self.keys[0].shape[1] - 1

    @property
    def longest_step(self) -> int:
        """Frames that may be written before the next queries look back."""
        return self.capacity - self.window + 1

    def reset(self, items: Tensor) -> None:
        """Start the streams of the given batch items (bool [B]) anew."""
        self.position.masked_fill_(items, 0)


@dataclass(frozen=True)
class StreamStep:
    """Frames `start ... stop` of a chunk: where they are written and what they see. Shared by the layers of a stage.

    Attributes:
        slots: [B * frames] index into the flattened [B * (capacity + 1)] slots.
        mask: [B, 1, frames, capacity], zero for visible keys and very negative for the others. It is finite, so that
            padding frames that see nothing do not become NaN.
    """

    start: int
    stop: int
    slots: Tensor
    mask: Tensor

    def write(self, ring: Tensor, frames: Tensor) -> Tensor:
        """Write the step's part of a chunk [B, T, H, D] into a ring; returns all its slots [B, H, capacity, D]."""
        ring.flatten(0, 1).index_copy_(0, self.slots, frames[:, self.start : self.stop].flatten(0, 1).to(ring.dtype))
        return ring[:, :-1].transpose(1, 2)


class StreamChunk:
    """A chunk on its way through the layers of a stage.

    Args:
        state: the stage's rings, written in place.
        frames: length of the chunk, padding included.
        num_frames: [B] valid frames of each item (at the front of the chunk), None when all are valid.
    """

    def __init__(self, state: StageState, frames: int, num_frames: Tensor | None) -> None:
        self.state = state
        self.num_frames = torch.full_like(state.position, frames) if num_frames is None else num_frames
        self.positions = state.position[:, None] + torch.arange(frames, device=state.position.device)
        starts = range(0, frames, state.longest_step)
        self.steps = [self._step(start, min(start + state.longest_step, frames)) for start in starts]

    def _step(self, start: int, stop: int) -> StreamStep:
        state, device = self.state, self.positions.device
        positions = self.positions[:, start:stop]
        slot = torch.arange(state.capacity, device=device)
        newest = state.position + self.num_frames.clamp(max=stop) - 1
        content = newest[:, None] - (newest[:, None] - slot) % state.capacity  # position of the frame in each slot
        distance = positions[:, :, None] - content[:, None]
        visible = (distance >= 0) & (distance < state.window) & (content >= 0)[:, None]
        dtype = state.keys[0].dtype
        hidden = torch.full((), torch.finfo(dtype).min / 2, dtype=dtype, device=device)
        mask = torch.where(visible, torch.zeros_like(hidden), hidden)[:, None]
        is_valid = torch.arange(start, stop, device=device) < self.num_frames[:, None]
        slots = torch.where(is_valid, positions % state.capacity, state.capacity)
        items = torch.arange(len(slots), device=device)[:, None]
        return StreamStep(start, stop, (slots + items * (state.capacity + 1)).flatten(), mask)

    def finish(self) -> None:
        """Move every stream on by the frames it brought."""
        self.state.position += self.num_frames
