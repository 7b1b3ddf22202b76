"""Continuous batched decoding, behind `batch_decode(..., streaming=True)`: rows join and leave from call to call."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .outputs import MossAudioTokenizerDecoderOutput

if TYPE_CHECKING:
    from .modeling_moss_audio_tokenizer import MossAudioTokenizerModel


class ContinuousDecoder:
    """Decodes a changing list of streams, its rows, in `max_batch_size` fixed slots.

    Rows are named by their place in the list. A row keeps its slot, so that leaving rows cost nothing.
    """

    def __init__(self, model: "MossAudioTokenizerModel", max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self.stream = model.stream(max_batch_size)
        self.slots: list[int] = []

    def decode(self, codes: Sequence[Tensor], finalize_indices: Sequence[int] = ()) -> MossAudioTokenizerDecoderOutput:
        """Audio of the next frames of every row.

        Args:
            codes: [n, frames] for each row in order; more of them than before are new rows at the end.
            finalize_indices: rows that end with this call; the rows after them move up.

        Returns:
            Audio [rows, C, T] and each row's own number of samples, in the order of `codes`.

        Raises:
            ValueError: fewer rows than are active, more than `max_batch_size`, or no such row to finalize.
        """
        self._check(codes, finalize_indices)
        free = [slot for slot in range(self.max_batch_size) if slot not in self.slots]
        slots = [*self.slots, *free[: len(codes) - len(self.slots)]]
        lengths = torch.zeros(self.max_batch_size, dtype=torch.int64)
        longest = max(item.shape[1] for item in codes)
        padded = codes[0].new_zeros(codes[0].shape[0], self.max_batch_size, longest)
        for slot, item in zip(slots, codes, strict=True):
            padded[:, slot, : item.shape[1]] = item
            lengths[slot] = item.shape[1]
        audio, samples = self.stream.decode(padded, lengths)
        leaving = torch.zeros(self.max_batch_size, dtype=torch.bool)
        leaving[[slots[row] for row in finalize_indices]] = True
        self.stream.reset(leaving)
        self.slots = [slot for slot in slots if not leaving[slot]]
        return MossAudioTokenizerDecoderOutput(audio=audio[slots], audio_lengths=samples[slots])

    def _check(self, codes: Sequence[Tensor], finalize_indices: Sequence[int]) -> None:
        active = len(self.slots)
        if not max(1, active) <= len(codes) <= self.max_batch_size:
            raise ValueError(
                f"{len(codes)} rows of codes for {active} active rows and max_batch_size={self.max_batch_size}; "
                "end rows with finalize_indices, or start anew with reset_stream=True"
            )
        if any(item.ndim != 2 or item.shape[0] != codes[0].shape[0] for item in codes):
            raise ValueError(
                f"every row needs codes [n, frames] of equal n, got {[tuple(item.shape) for item in codes]}"
            )
        if any(not 0 <= row < len(codes) for row in finalize_indices):
            raise ValueError(f"finalize_indices {list(finalize_indices)} must lie in 0..{len(codes) - 1}")
