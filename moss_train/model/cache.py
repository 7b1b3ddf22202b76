"""Streaming state of a transformer stage: fixed-size buffers that are passed in and updated in place.

Each layer keeps the keys and values of the `window - 1` most recent frames. A chunk attends to them and to itself, and
only then are the oldest dropped, which is exact for every chunk size. (A ring of exactly `window` entries overwrites
keys that the first queries of a chunk of two or more frames still need.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class StageState:
    """State of one transformer stage for a batch of streams.

    Attributes:
        position: [B] int64, frames seen so far by each stream; zero makes the item's buffers invisible.
        keys, values: per layer [B, H, window - 1, D].
    """

    position: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def window(self) -> int:
        return self.keys[0].shape[2] + 1

    def positions(self, frames: int) -> Tensor:
        """Absolute positions [B, frames] of a new chunk."""
        return self.position[:, None] + torch.arange(frames, device=self.position.device)

    def attention_mask(self, frames: int) -> Tensor:
        """Which of the `window - 1 + frames` keys each query of a chunk sees: [B, 1, frames, window - 1 + frames]."""
        device = self.position.device
        query = torch.arange(frames, device=device)[:, None]
        key = torch.arange(1 - self.window, frames, device=device)[None, :]
        in_window = (key <= query) & (query - key < self.window)
        is_past_start = key >= -self.position[:, None, None]
        return (in_window & is_past_start)[:, None]

    def append(self, layer: int, keys: Tensor, values: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add a chunk to a layer's buffers and return what its queries attend to.

        Args:
            keys, values: [B, H, T, D] of the chunk.
            kept: [B, window - 1] index into the joined frames of those to keep, None for the last `window - 1`.

        Returns:
            keys, values: [B, H, window - 1 + T, D].
        """
        joined_keys = torch.cat((self.keys[layer], keys), dim=2)
        joined_values = torch.cat((self.values[layer], values), dim=2)
        for buffer, joined in ((self.keys[layer], joined_keys), (self.values[layer], joined_values)):
            if kept is None:
                buffer.copy_(joined[:, :, keys.shape[2] :])
            else:
                index = kept[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
                torch.gather(joined, 2, index, out=buffer)
        return joined_keys, joined_values

    def kept_frames(self, num_frames: Tensor) -> Tensor:
        """Index for `append` when item b brings only `num_frames[b]` valid frames at the front of the chunk."""
        return num_frames[:, None] + torch.arange(self.window - 1, device=num_frames.device)

    def reset(self, items: Tensor) -> None:
        """Start the streams of the given batch items (bool [B]) anew; buffers need no clearing, the mask hides them."""
        self.position.masked_fill_(items, 0)
