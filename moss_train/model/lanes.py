"""Items of a stream that pass through the model together, and their state."""

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import StageState
from .graphs import StepRunner
from .passes import block_frames, new_states
from .quantizer import FoldedQuantizer

if TYPE_CHECKING:
    from .modeling_moss_audio_tokenizer import MossAudioTokenizerModel


class Lane:
    """State of `batch_size` items whose frames are computed at once.

    Args:
        quantizer: shared by the lanes of a stream.
        num_quantizers: levels to encode.
        chunk_frames: code frames per call that the buffers are sized for.
        cuda_graphs: see `StepRunner`.
    """

    def __init__(
        self,
        model: "MossAudioTokenizerModel",
        quantizer: FoldedQuantizer,
        batch_size: int,
        num_quantizers: int,
        chunk_frames: int,
        cuda_graphs: bool,
    ) -> None:
        self.model = model
        self.quantizer = quantizer
        self.batch_size = batch_size
        self.num_quantizers = num_quantizers
        self.chunk_frames = chunk_frames
        self.encode_step = StepRunner(self._encode_step, cuda_graphs)
        self.decode_step = StepRunner(self._decode_step, cuda_graphs)

    @cached_property
    def encoder_states(self) -> list[StageState]:
        """Buffers of the encoder's stages, made when the first audio comes."""
        return new_states(self.model, "encoder", self.batch_size, self.chunk_frames)

    @cached_property
    def decoder_states(self) -> list[StageState]:
        """Buffers of the decoder's stages, made when the first codes come."""
        return new_states(self.model, "decoder", self.batch_size, self.chunk_frames)

    def share_weights(self, other: "Lane", name: str) -> None:
        """Make "encoder_states" or "decoder_states", if they are not there, with the packed weights of another lane."""
        if other is not self and name not in self.__dict__:
            self.__dict__[name] = [state.new_like() for state in getattr(other, name)]

    def encode(self, audio: Tensor, counts: list[int]) -> Tensor:
        """Codes [N, B, F] of audio [B, C, F * hop], of which each item's first `counts` frames are its own."""
        hop = self.model.config.downsample_rate
        parts = [
            self.encode_step(part, self._own_frames(counts, start, part.shape[2] // hop))
            for start, part in self._blocks(audio, hop)
        ]
        empty = (self.num_quantizers, self.batch_size, 0)
        return join(parts) if parts else torch.zeros(empty, dtype=torch.int64, device=audio.device)

    def decode(self, codes: Tensor, counts: list[int]) -> Tensor:
        """Audio [B, C, F * hop] of codes [n, B, F], of which each item's first `counts` frames are its own."""
        parts = [
            self.decode_step(part, self._own_frames(counts, start, part.shape[2]))
            for start, part in self._blocks(codes)
        ]
        empty = (self.batch_size, self.model.config.number_channels, 0)
        return join(parts) if parts else torch.zeros(empty, dtype=self.model.dtype, device=codes.device)

    def reset(self, items: Tensor) -> None:
        """Start the given items' streams (bool [B] on the CPU) anew."""
        for name in ("encoder_states", "decoder_states"):
            for state in self.__dict__.get(name, ()):
                state.reset(items.to(self.model.device))

    def _blocks(self, codes_or_audio: Tensor, hop: int = 1) -> list[tuple[int, Tensor]]:
        """Cut the last dimension into parts of bounded length, each with the frame it starts at."""
        frames = codes_or_audio.shape[2] // hop
        block = block_frames(self.model, None, frames)
        return [(s, codes_or_audio[..., s * hop : (s + block) * hop]) for s in range(0, frames, block)]

    def _own_frames(self, counts: list[int], start: int, length: int) -> Tensor | None:
        """[B] how many of `length` frames from `start` are each item's own.

        None says all; that spares a CPU some operations, while a CUDA graph is for any numbers of frames.
        """
        own = [min(max(count - start, 0), length) for count in counts]
        if self.model.device.type == "cpu" and min(own) == length:
            return None
        return torch.tensor(own, device=self.model.device)

    def _encode_step(self, audio: Tensor, num_frames: Tensor | None) -> Tensor:
        latent = self.model.encode_latent(audio, self.encoder_states, num_frames)
        codes = self.quantizer.encode(latent, self.num_quantizers)
        if num_frames is None:
            return codes
        return codes * (torch.arange(latent.shape[1], device=latent.device) < num_frames[:, None])

    def _decode_step(self, codes: Tensor, num_frames: Tensor | None) -> Tensor:
        return self.model.decode_latent(self.quantizer.decode(codes), self.decoder_states, num_frames)


def join(parts: list[Tensor], dim: int = 2) -> Tensor:
    """Concatenate, along time by default; a single part stays as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
