"""Clips and batches, as the packages exchange them. B: clips, C: channels, T: samples, L: text tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moss_train.utils.errors import InvalidSample

TASKS = ("asr", "multi_speaker_asr", "caption")
"""Names of the text tasks; the index of a name is its id in `Batch.task_ids`."""


@dataclass(frozen=True)
class ListedClip:
    """One clip of a list; its audio is read when it is needed."""

    id: str
    domain: str
    read: Callable[[], tuple[Tensor, int]]  # audio [C, T] and its rate in Hz; raises UserError
    labels: dict[str, str] = field(default_factory=dict)  # text, task, language, speaker, where known


@dataclass(frozen=True)
class Batch:
    """Clips of similar length, padded to one length, with the random numbers for each clip already drawn.

    `quantizer_uniform` and `crop_uniform` depend only on the seed and the sample's position in the training stream, so
    a clip keeps its number of quantizer levels and its crop whatever the number of ranks, workers or micro-batches.
    """

    audio: Tensor  # [B, C, T] float32, zero beyond each length, T a whole number of hop_length
    audio_lengths: Tensor  # [B] int64, samples before padding
    text_tokens: Tensor  # [B, L] int64, padded with 0
    text_lengths: Tensor  # [B] int64, 0 for a clip without text
    task_ids: Tensor  # [B] int64, index into TASKS, -1 for a clip without text
    quantizer_uniform: Tensor  # [B] float32 in [0, 1)
    crop_uniform: Tensor  # [B] float32 in [0, 1)
    sample_ids: tuple[str, ...]
    domains: tuple[str, ...]
    host: "Batch | None" = None  # the batch that `to` copied from: reading its lengths does not wait for the device
    # For a decoder with its own sampling rate: the same clips at that rate; `audio` is at the encoder's.
    target: Tensor | None = None  # [B, C, T'] float32, as many frames as `audio`
    target_lengths: Tensor | None = None  # [B] int64

    @property
    def num_clips(self) -> int:
        """Number of clips, B."""
        return len(self.sample_ids)

    @property
    def reference(self) -> Tensor:
        """What the decoder's output is compared with, [B, C, T] at its rate: the target, or the audio itself."""
        return self.audio if self.target is None else self.target

    @property
    def reference_lengths(self) -> Tensor:
        """Samples of each clip of `reference` before padding, [B] int64."""
        return self.audio_lengths if self.target_lengths is None else self.target_lengths

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its tensors on `device`; copies from pinned memory are asynchronous."""
        return replace(self._map(lambda tensor: tensor.to(device, non_blocking=True)), host=self.host or self)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; the DataLoader calls this when asked to pin."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values: dict[str, Any] = {
            name: function(value) if isinstance(value, Tensor) else value for name, value in vars(self).items()
        }
        return Batch(**values)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle CPU tensors as numpy arrays, so that they travel between processes through the pipe.

        Tensors would go through shared memory, which containers limit to 64 MB and which keeps a file open for each.
        """
        return {
            name: value.numpy() if isinstance(value, Tensor) and value.device.type == "cpu" else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, arrays: dict[str, Any]) -> None:
        for name, value in arrays.items():
            vars(self)[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@dataclass(frozen=True)
class UpdateBatch:
    """Everything that one rank needs for one generator update, and the position of the stream after it."""

    micro_batches: tuple[Batch, ...]
    update: int  # number of this update
    next_position: int  # sample position of the stream after this update; all that a resume needs
    dropped: tuple[InvalidSample, ...]  # samples that could not be read
    without_text: tuple[str, ...] = ()  # ids of samples used without their text, because it is too long

    def to(self, device: torch.device | str) -> "UpdateBatch":
        """Return the update with every micro-batch on `device`."""
        return replace(self, micro_batches=tuple(batch.to(device) for batch in self.micro_batches))

    def pin_memory(self) -> "UpdateBatch":
        """Return the update with every micro-batch in page-locked memory."""
        return replace(self, micro_batches=tuple(batch.pin_memory() for batch in self.micro_batches))
