"""Streams: audio in, codes out (and back) in chunks of any size, equal to the offline result."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import check_audio, check_codes
from .lanes import Lane, join
from .quantizer import FoldedQuantizer

if TYPE_CHECKING:
    from .modeling_moss_audio_tokenizer import MossAudioTokenizerModel


class MossAudioTokenizerStream:
    """State of `batch_size` independent streams through one model; make it with `model.stream(batch_size)`.

    Items may bring different numbers of samples or frames per call, join after `reset` and leave at any time; none
    touches the others. A stream belongs to the weights that the model had when it was made.

    Args:
        num_quantizers: levels to encode, all by default.
        chunk_frames: code frames per call that the buffers are sized for; others are exact too, only slower.
        cuda_graphs: on CUDA, replay captured graphs, one per shape of the input (see `StepRunner`).
        batch_invariant: an item's results do not depend, to the last bit, on the other items or their number: each
            passes alone and unpadded, which costs the speed-up of batching. (They still depend on the chunks' sizes.)
    """

    def __init__(
        self,
        model: "MossAudioTokenizerModel",
        batch_size: int = 1,
        num_quantizers: int | None = None,
        chunk_frames: int = 4,
        cuda_graphs: bool = True,
        batch_invariant: bool = False,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("chunk_frames", chunk_frames)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model = model
        self.batch_size = batch_size
        self.num_quantizers = model.check_num_quantizers(num_quantizers)
        size = 1 if batch_invariant else batch_size
        quantizer = FoldedQuantizer(model.quantizer)
        self.lanes = [
            Lane(model, quantizer, size, self.num_quantizers, chunk_frames, cuda_graphs)
            for _ in range(batch_size // size)
        ]
        self._pending = [self._no_samples() for _ in range(batch_size)]

    @torch.no_grad()
    def encode(self, chunk: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take any number of samples and return the codes of the frames they complete.

        Args:
            chunk: [B, C, T] or [B, T] samples.
            lengths: [B] how many of the T samples each item brings, None for all.

        Returns:
            codes [N, B, frames], zero beyond each item's own, and, as [B] int64, how many of the frames are its own.
        """
        chunk = check_audio(self.model.config, chunk).to(self.model.device)
        counts = self._counts(chunk.shape[0], chunk.shape[2], lengths)
        hop = self.model.config.downsample_rate
        if chunk.shape[2] % hop == 0 and min(counts) == chunk.shape[2] and not any(x.shape[1] for x in self._pending):
            return self._encode_frames(chunk, [chunk.shape[2] // hop] * self.batch_size)
        arrived = [
            torch.cat((pending, samples[:, :count].to(pending)), dim=1) if pending.shape[1] else samples[:, :count]
            for pending, samples, count in zip(self._pending, chunk, counts, strict=True)
        ]
        frames = [samples.shape[1] // hop for samples in arrived]
        # Copies, so that the caller may use the memory of the chunk again.
        self._pending = [samples[:, n * hop :].clone() for samples, n in zip(arrived, frames, strict=True)]
        ready = [samples[:, : n * hop] for samples, n in zip(arrived, frames, strict=True)]
        return self._encode_frames(pad_rows(ready), frames)

    @torch.no_grad()
    def flush(self) -> tuple[Tensor, Tensor]:
        """Encode what is left of a started frame, zero-padded, as `encode` does. The streams can then be reset."""
        hop = self.model.config.downsample_rate
        ready = [F.pad(x, (0, -x.shape[1] % hop)) for x in self._pending]
        self._pending = [self._no_samples() for _ in ready]
        return self._encode_frames(pad_rows(ready), [x.shape[1] // hop for x in ready])

    @torch.no_grad()
    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Audio of the next frames of codes.

        Args:
            codes: [n, B, F] of the first n levels.
            lengths: [B] how many of the F frames each item brings, None for all.

        Returns:
            audio [B, C, F * hop] and, as [B] int64, how many samples of it are each item's own.
        """
        check_codes(self.model.config, codes)
        codes = codes.to(self.model.device, torch.int64)
        counts = self._counts(codes.shape[1], codes.shape[2], lengths)
        hop = self.model.config.downsample_rate
        parts = []
        for lane, items, longest in self._lanes(counts, "decoder_states"):
            audio = lane.decode(codes[:, items, :longest], counts[items])
            parts.append(pad_time(audio, codes.shape[2] * hop))
        return join(parts, dim=0), torch.tensor(counts, device=codes.device) * hop

    def reset(self, items: Tensor | None = None) -> None:
        """Start the given items' streams (bool [B], None for all) anew; their unfinished frames are dropped."""
        chosen = torch.ones(self.batch_size, dtype=torch.bool) if items is None else items.cpu().bool()
        if chosen.shape != (self.batch_size,):
            raise ValueError(f"reset takes one bool for each of the {self.batch_size} items, got {tuple(chosen.shape)}")
        size = self.lanes[0].batch_size
        for lane, items in zip(self.lanes, chosen.split(size), strict=True):
            lane.reset(items)
        self._pending = [self._no_samples() if c else p for c, p in zip(chosen.tolist(), self._pending, strict=True)]

    def _no_samples(self) -> Tensor:
        return torch.zeros(self.model.config.number_channels, 0, device=self.model.device)

    def _counts(self, batch: int, longest: int, lengths: Tensor | None) -> list[int]:
        """Samples or frames that each item brings, checked."""
        if batch != self.batch_size:
            raise ValueError(f"this stream has {self.batch_size} items, the chunk has {batch}")
        counts = [longest] * batch if lengths is None else lengths.tolist()
        if len(counts) != batch or not all(0 <= count <= longest for count in counts):
            raise ValueError(f"lengths must be {batch} numbers from 0 to {longest}, got {counts}")
        return counts

    def _lanes(self, counts: list[int], states: str) -> Iterator[tuple[Lane, slice, int]]:
        """Each lane, its items, and the most frames that one of them brings."""
        size = self.lanes[0].batch_size
        for number, lane in enumerate(self.lanes):
            lane.share_weights(self.lanes[0], states)
            items = slice(number * size, (number + 1) * size)
            yield lane, items, max(counts[items])

    def _encode_frames(self, audio: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Codes of audio [B, C, F * hop], of which each item's first `counts` frames are its own."""
        hop = self.model.config.downsample_rate
        parts = []
        for lane, items, longest in self._lanes(counts, "encoder_states"):
            codes = lane.encode(audio[items, :, : longest * hop], counts[items])
            parts.append(pad_time(codes, audio.shape[2] // hop))
        return join(parts, dim=1), torch.tensor(counts, device=audio.device)


def pad_time(x: Tensor, longest: int) -> Tensor:
    """Zeros behind, up to `longest` frames or samples."""
    return x if x.shape[-1] == longest else F.pad(x, (0, longest - x.shape[-1]))


def pad_rows(rows: list[Tensor]) -> Tensor:
    """Audio [C, T] of different T as one batch [B, C, T], silent behind."""
    longest = max(row.shape[1] for row in rows)
    return torch.stack([pad_time(row, longest) for row in rows])
