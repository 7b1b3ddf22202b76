"""Streaming state of a transformer stage (KV cache): ring buffers of keys and values, passed in and updated in place.

Frame p of a stream lies in slot `p % capacity`. The capacity is `window - 1` plus the longest step, so that a step
never overwrites keys that its own first queries still need. (A ring of exactly `window` slots would, in every step
of two or more frames.) Which slots a query attends to follows from positions alone: nothing is ever moved or cleared.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .accelerated_step import LinearOps

NUM_VIEWS = 8  # number of lengths that the attended part of a ring takes while it fills


@dataclass
class StageState:
    """State of one transformer stage for a batch of streams.

    Attributes:
        position: [B] int64, frames processed so far in each stream; at zero all slots of the item are masked.
        rings: per layer [B, capacity + 1, 2 * H, D], the keys' heads and then the values'; padding frames are written
            to the last slot.
        window: frames that a query attends to, itself included.
        linears: applies the stage's linear layers.
        num_written: upper bound on the number of slots in use, kept on the host.
        slot: [1, capacity] the indices of the slots.
    """

    position: Tensor
    rings: list[Tensor]
    window: int
    linears: LinearOps = field(default_factory=LinearOps)
    num_written: int = 0

    def __post_init__(self) -> None:
        self.slot = torch.arange(self.capacity, device=self.position.device)[None]

    @property
    def capacity(self) -> int:
        """Slots of a ring, without the one for padding frames."""
        return self.rings[0].shape[1] - 1

    @property
    def longest_step(self) -> int:
        """Frames that can be written at once without overwriting keys that their queries still need."""
        return self.capacity - self.window + 1

    def new_like(self) -> "StageState":
        """Return an empty state of the same sizes that shares the packed or cast weights."""
        rings = [torch.zeros_like(ring) for ring in self.rings]
        return StageState(torch.zeros_like(self.position), rings, self.window, self.linears)

    def reset(self, items: Tensor) -> None:
        """Restart the streams of the given batch items (bool [B])."""
        self.position.masked_fill_(items.to(self.position.device), 0)
        if items.device.type == "cpu" and bool(items.all()):
            self.num_written = 0


@dataclass(frozen=True)
class StreamStep:
    """Frames `start` to `stop` of a chunk: the slots that they are written to and those that they attend to.

    All layers of a stage share it, and layers on another GPU a copy.

    Attributes:
        slots: [B * frames] index into the flattened [B * (capacity + 1)] slots.
        mask: [B, 1, frames, slots], zero for visible keys and very negative for the others. Finite, so that padding
            frames without any visible key do not become NaN.
    """

    start: int
    stop: int
    slots: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> "StreamStep":
        """Return the step on a device."""
        if self.slots.device == device:
            return self
        return StreamStep(self.start, self.stop, self.slots.to(device), self.mask.to(device))

    def write(self, ring: Tensor, frames: Tensor) -> Tensor:
        """Write the step's part of a chunk [B, T, 2 * H, D] into a ring; returns the slots [B, 2 * H, slots, D]."""
        ring.flatten(0, 1).index_copy_(0, self.slots, frames[:, self.start : self.stop].flatten(0, 1).to(ring.dtype))
        return ring[:, : self.mask.shape[3]].transpose(1, 2)


class StreamChunk:
    """A chunk on its way through the layers of a stage.

    Args:
        state: the stage's rings, written in place.
        frames: length of the chunk, padding included.
        num_frames: [B] valid frames of each item (at the front of the chunk), None when all are valid.
    """

    def __init__(self, state: StageState, frames: int, num_frames: Tensor | None) -> None:
        self.state = state
        self.frames = frames
        self.num_frames = None if num_frames is None else num_frames.to(state.position.device)
        self.offsets = torch.arange(frames, device=state.position.device)
        self.positions = state.position[:, None] + self.offsets
        starts = range(0, frames, state.longest_step)
        self.steps = [self._step(start, min(start + state.longest_step, frames)) for start in starts]

    def _step(self, start: int, stop: int) -> StreamStep:
        state, capacity = self.state, self.state.capacity
        positions = self.positions[:, start:stop]
        valid = stop if self.num_frames is None else self.num_frames[:, None].clamp(max=stop)
        newest = state.position[:, None] + (valid - 1)
        num_attended = capacity
        if state.position.device.type == "cpu":  # only slots that may be filled; a CUDA graph has fixed shapes
            part = math.ceil(capacity / NUM_VIEWS)
            num_attended = min(capacity, part * math.ceil((state.num_written + stop) / part))
        # Age of each slot: by how many frames it precedes the newest one. An unwritten slot is older than any window.
        age = (newest - state.slot[:, :num_attended]) % capacity
        age = age.masked_fill(age > newest, 2 * capacity)
        distance = age[:, None] - (newest - positions)[:, :, None]
        dtype = state.rings[0].dtype
        hidden = (distance < 0) | (distance >= state.window)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        mask = mask.masked_fill_(hidden, torch.finfo(dtype).min / 2)[:, None]
        slots = positions % capacity
        if self.num_frames is not None:
            slots = torch.where(self.offsets[start:stop] < self.num_frames[:, None], slots, capacity)
        if len(slots) > 1:
            slots = slots + torch.arange(len(slots), device=slots.device)[:, None] * (capacity + 1)
        return StreamStep(start, stop, slots.flatten(), mask)

    def advance(self) -> None:
        """Advance every stream by its number of frames in the chunk."""
        self.state.position += self.frames if self.num_frames is None else self.num_frames
        self.state.num_written = min(self.state.num_written + self.frames, self.state.capacity)
