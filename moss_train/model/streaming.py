"""Streaming encode and decode in chunks of any size, equal to the offline result."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .accelerated_step import GraphedStep
from .argument_checks import check_audio, check_codes, check_samples
from .codec import LatentCodec, MossAudioTokenizerDecoderOutput, block_frames
from .kv_cache import StageState
from .quantizer import FoldedQuantizer


def without_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method without gradients, and outside of the caller's inference mode.

    The state of a stream would otherwise be inference tensors, which no later call outside of that mode may change.
    """
    return torch.inference_mode(False)(torch.no_grad()(function))


class StreamGroup:
    """Items of a stream that the model processes as one batch, and their state.

    Args:
        quantizer: shared by the groups of a stream.
        batch_size: number of items.
        num_quantizers: levels to encode.
        chunk_frames: code frames per call that the buffers are sized for.
        cuda_graphs: see `GraphedStep`.
        first: another group of the stream, whose prepacked weights this one shares.
    """

    def __init__(
        self,
        model: LatentCodec,
        quantizer: FoldedQuantizer,
        batch_size: int,
        num_quantizers: int,
        chunk_frames: int,
        cuda_graphs: bool,
        first: "StreamGroup | None" = None,
    ) -> None:
        self.model = model
        self.quantizer = quantizer
        self.batch_size = batch_size
        self.num_quantizers = num_quantizers
        self.chunk_frames = chunk_frames
        self.first = first
        self.encode_step = GraphedStep(self._encode_step, cuda_graphs)
        self.decode_step = GraphedStep(self._decode_step, cuda_graphs)
        self._states: dict[str, list[StageState]] = {}

    def states(self, part: str) -> list[StageState]:
        """Return the buffers of the stages of "encoder" or "decoder", made when they are first needed."""
        if part not in self._states and self.first is not None:
            self._states[part] = [state.new_like() for state in self.first.states(part)]
        elif part not in self._states:
            self._states[part] = self.model.new_states(part, self.batch_size, self.chunk_frames)
        return self._states[part]

    def encode(self, audio: Tensor, counts: list[int]) -> Tensor:
        """Encode audio [B, C, F * hop] to codes [N, B, F]; the first `counts` frames of each item are valid."""
        empty = torch.zeros(self.num_quantizers, self.batch_size, 0, dtype=torch.int64, device=audio.device)
        return self._in_blocks(self.encode_step, audio, counts, self.model.config.downsample_rate, empty)

    def decode(self, codes: Tensor, counts: list[int]) -> Tensor:
        """Decode codes [n, B, F] to audio [B, C, T]; the first `counts` frames of each item are valid."""
        channels = self.model.config.number_channels
        empty = torch.zeros(self.batch_size, channels, 0, dtype=self.model.dtype, device=codes.device)
        return self._in_blocks(self.decode_step, codes, counts, 1, empty)

    def reset(self, items: Tensor) -> None:
        """Restart the streams of the given items (bool [B] on the CPU)."""
        for states in self._states.values():
            for state in states:
                state.reset(items.to(self.model.execution_device))

    def _in_blocks(self, step: GraphedStep, x: Tensor, counts: list[int], hop: int, empty: Tensor) -> Tensor:
        """Apply a step to x [.., F * hop] in parts of bounded length; `empty` is the result for zero frames."""
        frames, device = x.shape[2] // hop, self.model.execution_device
        block = block_frames(self.model, None, frames)
        parts = []
        for start in range(0, frames, block):
            length = min(block, frames - start)
            own = [min(max(count - start, 0), length) for count in counts]
            # None (all frames are valid) saves a CPU some operations; a CUDA graph takes any number of valid frames.
            all_own = device.type == "cpu" and min(own) == length
            part = x[..., start * hop : (start + length) * hop]
            parts.append(step(part, None if all_own else torch.tensor(own, device=device)))
        return join(parts) if parts else empty

    def _encode_step(self, audio: Tensor, num_frames: Tensor | None) -> Tensor:
        latent = self.model.encode_latent(audio, self.states("encoder"), num_frames)
        codes = self.quantizer.encode(latent, self.num_quantizers)
        if num_frames is None:
            return codes
        return codes * (torch.arange(latent.shape[1], device=latent.device) < num_frames[:, None])

    def _decode_step(self, codes: Tensor, num_frames: Tensor | None) -> Tensor:
        return self.model.decode_latent(self.quantizer.decode(codes), self.states("decoder"), num_frames)


class MossAudioTokenizerStream:
    """State of `batch_size` independent streams through one model; make it with `model.stream(batch_size)`.

    Items may pass different numbers of samples or frames per call, join after `reset` and leave at any time, without
    affecting each other. A stream may copy weights when it is made: after a change of the weights, make a new one.

    Args:
        num_quantizers: levels to encode, all by default.
        chunk_frames: code frames per call that the buffers are sized for; others give the same result, only slower.
        cuda_graphs: on CUDA, replay captured graphs, one per shape of the input (see `GraphedStep`), if all weights are
            on one GPU.
        batch_invariant: make an item's results independent, to the last bit, of the other items and their number: each
            is computed alone and unpadded, without the speed-up of batching. (They still depend on the chunk sizes.)
    """

    def __init__(
        self,
        model: LatentCodec,
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
        cuda_graphs = cuda_graphs and {weight.device for weight in model.parameters()} == {model.execution_device}
        quantizer = FoldedQuantizer(model.quantizer, model.execution_device)
        self.groups: list[StreamGroup] = []
        for _ in range(batch_size // size):
            first = self.groups[0] if self.groups else None
            group = StreamGroup(model, quantizer, size, self.num_quantizers, chunk_frames, cuda_graphs, first)
            self.groups.append(group)
        self._pending = [self._no_samples() for _ in range(batch_size)]

    @without_gradients
    def encode(self, chunk: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take any number of samples and return the codes of the frames they complete.

        Args:
            chunk: [B, C, T] or [B, T] samples.
            lengths: [B] valid samples of each item, None for all T.

        Returns:
            Codes [N, B, frames], zero beyond each item's valid frames, and the number of those, [B] int64.
        """
        self.model.check_part("encoder")
        chunk = check_audio(self.model.config, chunk)
        counts = self._counts(chunk.shape[0], chunk.shape[2], lengths)
        check_samples(self.model.config, chunk, torch.tensor(counts), self.model.warned)
        chunk = chunk.to(self.model.execution_device)
        hop = self.model.config.downsample_rate
        if chunk.shape[2] % hop == 0 and min(counts) == chunk.shape[2] and not any(x.shape[1] for x in self._pending):
            return self._encode_frames(chunk, [chunk.shape[2] // hop] * self.batch_size)
        arrived = [
            torch.cat((pending, samples[:, :count].to(pending)), dim=1) if pending.shape[1] else samples[:, :count]
            for pending, samples, count in zip(self._pending, chunk, counts, strict=True)
        ]
        frames = [samples.shape[1] // hop for samples in arrived]
        # Copies, so that the caller may reuse the memory of the chunk.
        self._pending = [samples[:, n * hop :].clone() for samples, n in zip(arrived, frames, strict=True)]
        ready = [samples[:, : n * hop] for samples, n in zip(arrived, frames, strict=True)]
        return self._encode_frames(pad_rows(ready), frames)

    @without_gradients
    def flush(self) -> tuple[Tensor, Tensor]:
        """Encode the remaining samples of a partial frame, zero-padded; returns the same as `encode`.

        Call it at the end of the streams, before `reset`.
        """
        hop = self.model.config.downsample_rate
        ready = [F.pad(x, (0, -x.shape[1] % hop)) for x in self._pending]
        self._pending = [self._no_samples() for _ in ready]
        return self._encode_frames(pad_rows(ready), [x.shape[1] // hop for x in ready])

    @without_gradients
    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the audio of the next frames of codes.

        Args:
            codes: [n, B, F] of the first n levels.
            lengths: [B] valid frames of each item, None for all F.

        Returns:
            Audio [B, C, F * upsample_rate] and the number of valid samples of each item, [B] int64.
        """
        self.model.check_part("decoder")
        codes = check_codes(self.model.config, codes).to(self.model.execution_device)
        counts = self._counts(codes.shape[1], codes.shape[2], lengths)
        hop = self.model.config.upsample_rate
        parts = []
        for group, items, longest in self._groups(counts):
            audio = group.decode(codes[:, items, :longest], counts[items])
            parts.append(pad_time(audio, codes.shape[2] * hop))
        return join(parts, dim=0), torch.tensor(counts, device=codes.device) * hop

    def reset(self, items: Tensor | None = None) -> None:
        """Restart the streams of the given items (bool [B], None for all); samples of partial frames are dropped."""
        chosen = torch.ones(self.batch_size, dtype=torch.bool) if items is None else items.cpu().bool()
        if chosen.shape != (self.batch_size,):
            raise ValueError(f"reset takes one bool for each of the {self.batch_size} items, got {tuple(chosen.shape)}")
        size = self.groups[0].batch_size
        for group, items in zip(self.groups, chosen.split(size), strict=True):
            group.reset(items)
        self._pending = [self._no_samples() if c else p for c, p in zip(chosen.tolist(), self._pending, strict=True)]

    def _no_samples(self) -> Tensor:
        return torch.zeros(self.model.config.number_channels, 0, device=self.model.execution_device)

    def _counts(self, batch: int, longest: int, lengths: Tensor | None) -> list[int]:
        """Return the checked number of samples or frames of each item in a call."""
        if batch != self.batch_size:
            raise ValueError(f"this stream has {self.batch_size} items, the chunk has {batch}")
        counts = [longest] * batch if lengths is None else lengths.tolist()
        if len(counts) != batch or not all(0 <= count <= longest for count in counts):
            raise ValueError(f"lengths must be {batch} numbers from 0 to {longest}, got {counts}")
        return counts

    def _groups(self, counts: list[int]) -> Iterator[tuple[StreamGroup, slice, int]]:
        """Yield each group, its items, and the largest of their counts."""
        size = self.groups[0].batch_size
        for number, group in enumerate(self.groups):
            items = slice(number * size, (number + 1) * size)
            yield group, items, max(counts[items])

    def _encode_frames(self, audio: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Encode audio [B, C, F * hop]; the first `counts` frames of each item are valid."""
        hop = self.model.config.downsample_rate
        parts = []
        for group, items, longest in self._groups(counts):
            codes = group.encode(audio[items, :, : longest * hop], counts[items])
            parts.append(pad_time(codes, audio.shape[2] // hop))
        return join(parts, dim=1), torch.tensor(counts, device=audio.device)


class ContinuousDecoder:
    """Decodes a changing list of streams (rows) in `max_batch_size` fixed slots: continuous batching.

    A row is identified by its index in the list. It keeps its slot, so that the end of another row costs nothing.
    """

    def __init__(self, model: LatentCodec, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self.stream = MossAudioTokenizerStream(model, max_batch_size)
        self.slots: list[int] = []

    def decode(self, codes: Sequence[Tensor], finalize_indices: Sequence[int] = ()) -> MossAudioTokenizerDecoderOutput:
        """Return the audio of the next frames of every row.

        Args:
            codes: [n, frames] for each row in order; those after the active rows start new rows.
            finalize_indices: rows that end with this call; the rows after them move up.

        Returns:
            Audio [rows, C, T] and the number of valid samples of each row, in the order of `codes`.

        Raises:
            ValueError: fewer rows than are active, more than `max_batch_size`, or no such row to finalize.
        """
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


def pad_time(x: Tensor, longest: int) -> Tensor:
    """Append zeros up to `longest` frames or samples."""
    return x if x.shape[-1] == longest else F.pad(x, (0, longest - x.shape[-1]))


def pad_rows(rows: list[Tensor]) -> Tensor:
    """Stack audio [C, T] of different T into one batch [B, C, T], zero-padded at the end."""
    longest = max(row.shape[1] for row in rows)
    return torch.stack([pad_time(row, longest) for row in rows])


def join(parts: list[Tensor], dim: int = 2) -> Tensor:
    """Concatenate, along time by default; a single part stays as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
