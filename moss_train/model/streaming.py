"""Streams: audio in, codes out (and back) in chunks of any size, equal to the offline result."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import StageState

if TYPE_CHECKING:
    from .modeling_moss_audio_tokenizer import MossAudioTokenizerModel


class MossAudioTokenizerStream:
    """State of `batch_size` independent streams through one model.

    Items may bring different numbers of samples or frames per call, join after `reset` and leave at any time; none
    touches the others. Make it with `model.stream(batch_size)`.
    """

    def __init__(self, model: "MossAudioTokenizerModel", batch_size: int, num_quantizers: int | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model
        self.batch_size = batch_size
        self.num_quantizers = model.check_num_quantizers(num_quantizers)
        self.encoder_states = [stage.new_state(batch_size) for stage in model.stages(model.encoder)]
        self.decoder_states = [stage.new_state(batch_size) for stage in model.stages(model.decoder)]
        self._pending = [self._no_samples() for _ in range(batch_size)]

    def _no_samples(self) -> Tensor:
        return torch.zeros(self.model.config.number_channels, 0, device=self.model.device)

    @torch.no_grad()
    def encode(self, chunk: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take any number of samples and return the codes of the frames they complete.

        Args:
            chunk: [B, C, T] or [B, T] samples.
            lengths: [B] how many of the T samples each item brings, None for all.

        Returns:
            codes [N, B, frames] and, as [B] int64, how many of the frames are each item's own.
        """
        chunk = self.model.check_audio(chunk)
        if chunk.shape[0] != self.batch_size:
            raise ValueError(f"this stream has {self.batch_size} items, the chunk has {chunk.shape[0]}")
        hop = self.model.config.downsample_rate
        counts = [chunk.shape[2]] * self.batch_size if lengths is None else lengths.tolist()
        arrived = [
            torch.cat((pending, samples[:, :count].to(pending)), dim=1)
            for pending, samples, count in zip(self._pending, chunk, counts, strict=True)
        ]
        frames = [samples.shape[1] // hop for samples in arrived]
        self._pending = [samples[:, count * hop :] for samples, count in zip(arrived, frames, strict=True)]
        ready = [samples[:, : count * hop] for samples, count in zip(arrived, frames, strict=True)]
        return self._encode_frames(ready, frames)

    @torch.no_grad()
    def flush(self) -> tuple[Tensor, Tensor]:
        """Encode what is left of a started frame, zero-padded, as `encode` does. The streams can then be reset."""
        hop = self.model.config.downsample_rate
        ready = [torch.nn.functional.pad(x, (0, -x.shape[1] % hop)) for x in self._pending]
        self._pending = [self._no_samples() for _ in ready]
        return self._encode_frames(ready, [samples.shape[1] // hop for samples in ready])

    def _encode_frames(self, ready: list[Tensor], frames: list[int]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor(frames, device=self.model.device)
        if max(frames) == 0:
            return lengths.new_zeros(self.num_quantizers, self.batch_size, 0), lengths
        samples = max(frames) * self.model.config.downsample_rate
        audio = torch.stack([torch.nn.functional.pad(x, (0, samples - x.shape[1])) for x in ready])
        ragged = None if min(frames) == max(frames) else lengths
        latent = self.encode_latent(audio, ragged)
        return self.model.quantizer.encode(latent, self.num_quantizers), lengths

    def encode_latent(self, audio: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Whole frames of audio [B, C, F * hop] -> latent [B, F, D]; `num_frames` [B] are the valid ones, None all."""
        return self.model.encode_latent(audio, self.encoder_states, num_frames)

    @torch.no_grad()
    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Audio of the next frames of codes.

        Args:
            codes: [n, B, F] of the first n levels.
            lengths: [B] how many of the F frames each item brings, None for all.

        Returns:
            audio [B, C, F * hop] and, as [B] int64, how many samples of it are each item's own.
        """
        self.model.check_codes(codes)
        if codes.shape[1] != self.batch_size:
            raise ValueError(f"this stream has {self.batch_size} items, the codes have {codes.shape[1]}")
        frames = codes.new_full((self.batch_size,), codes.shape[2]) if lengths is None else lengths.to(codes.device)
        audio = self.model.decode_latent(self.model.quantizer.decode(codes), self.decoder_states, lengths)
        return audio, frames * self.model.config.downsample_rate

    def reset(self, items: Tensor | None = None) -> None:
        """Start the given items' streams (bool [B], None for all) anew; their unfinished frames are dropped."""
        device = self.model.device
        chosen = torch.ones(self.batch_size, dtype=torch.bool) if items is None else items.cpu()
        for state in (*self.encoder_states, *self.decoder_states):
            state.reset(chosen.to(device))
        self._pending = [self._no_samples() if c else p for c, p in zip(chosen.tolist(), self._pending, strict=True)]


def run_stages(
    modules: torch.nn.ModuleList, x: Tensor, states: list[StageState] | None, num_frames: Tensor | None, frames: int
) -> Tensor:
    """Pass [B, T, C] through patch modules and transformer stages, with streaming states when given.

    Args:
        num_frames: [B] valid code frames of each item, None when all `frames` are valid.
        frames: code frames in `x`, from which each stage's own rate follows.
    """
    remaining = iter(states or ())
    for module in modules:
        if not hasattr(module, "transformer"):
            x = module(x)
        elif states is None:
            x = module(x)
        else:
            valid = None if num_frames is None else num_frames * (x.shape[1] // frames)
            x = module(x, next(remaining), valid)
    return x
