"""The training loader: plans are made in the main process, workers only read, so their number changes nothing."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from moss_train.batch import Batch, UpdateBatch
from moss_train.data.stream.sample_reader import SampleReader, TextEncoder, TrainingClip
from moss_train.data.stream.stream import AudioStream, ClipFormat, SampleRef, UpdatePlan
from moss_train.utils.bad_data import BadSample, SampleError
from moss_train.utils.errors import UserError
from moss_train.utils.workers import num_cores, start_worker

WORKER_TIMEOUT_SECONDS = 600
"""A worker that delivers nothing for so long hangs, say on a dead network file system: the run stops with an error."""

PlannedUpdate = tuple[int, UpdatePlan]


class PlanSampler(Sampler[PlannedUpdate]):
    """Yields (update, plan) for consecutive updates, planned one at a time from a position of the stream."""

    def __init__(
        self,
        stream: AudioStream,
        *,
        position: int,
        updates: Sequence[tuple[int, float]],
        micro_batch_seconds: float,
        rank: int,
        world_size: int,
    ) -> None:
        self._stream = stream
        self._position = position
        self._updates = updates
        self._micro_batch_seconds = micro_batch_seconds
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        return len(self._updates)

    def __iter__(self) -> Iterator[PlannedUpdate]:
        position = self._position
        for update, batch_seconds in self._updates:
            plan = self._stream.plan_update(
                position, batch_seconds, self._micro_batch_seconds, self._rank, self._world_size
            )
            position = plan.next_position
            yield update, plan


class _PlannedUpdates(Dataset[UpdateBatch]):
    """Reads planned updates; what is left out is named in the result."""

    def __init__(self, clip_format: ClipFormat, text_encoder: TextEncoder | None) -> None:
        self._hop_length = clip_format.hop_length
        self._reader = SampleReader(clip_format, text_encoder)

    def __getitem__(self, item: PlannedUpdate) -> UpdateBatch:
        update, plan = item
        dropped: list[BadSample] = []
        groups = [self._read(refs, dropped) for refs in plan.micro_batches]
        batches = tuple(collate(clips, self._hop_length) for clips in groups if clips)
        return UpdateBatch(batches, update, plan.next_position, tuple(dropped))

    def _read(self, refs: Sequence[SampleRef], dropped: list[BadSample]) -> list[TrainingClip]:
        clips = []
        for ref in refs:
            try:
                clips.append(self._reader.read(ref))
            except SampleError as error:
                dropped.append(BadSample(error.clip_id, error.reason, error.fault))
        return clips


def make_loader(
    stream: AudioStream,
    *,
    text_encoder: TextEncoder | None,
    position: int,
    updates: Sequence[tuple[int, float]],
    micro_batch_seconds: float,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[UpdateBatch]:
    """Make the loader of one rank: one UpdateBatch for every (update, batch_seconds) of `updates`, in order.

    The items are the same to the last bit for any number of workers, of which no more start than there are cores, and
    together over the ranks the same samples for any world size. An update whose samples on this rank are all unreadable
    has no micro-batches. Without a text encoder clips with text are used whole, without it. Raises UserError when a
    clip exceeds `micro_batch_seconds`.
    """
    check_longest(stream, micro_batch_seconds)
    sampler = PlanSampler(
        stream,
        position=position,
        updates=updates,
        micro_batch_seconds=micro_batch_seconds,
        rank=rank,
        world_size=world_size,
    )
    num_workers = min(num_workers, num_cores())
    return DataLoader(
        _PlannedUpdates(stream.clip_format, text_encoder),
        sampler=sampler,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        timeout=WORKER_TIMEOUT_SECONDS if num_workers else 0,
        pin_memory=torch.cuda.is_available(),
    )


def check_longest(stream: AudioStream, micro_batch_seconds: float) -> None:
    """Raise UserError when a clip alone is more than a micro-batch."""
    if stream.longest_seconds > micro_batch_seconds:
        raise UserError(
            f"data.micro_batch_seconds={micro_batch_seconds} is less than the longest clip used, "
            f"{stream.longest_seconds:.2f} s; raise it, or lower data.crop_seconds (clips without text) or "
            "data.max_seconds (clips with text)"
        )


def collate(clips: Sequence[TrainingClip], hop_length: int) -> Batch:
    """Pad clips to one length, a whole number of `hop_length` samples, and their tokens likewise."""
    audio_lengths = torch.tensor([clip.audio.shape[-1] for clip in clips])
    num_frames = -(-int(audio_lengths.max()) // hop_length)
    audio = clips[0].audio.new_empty(len(clips), clips[0].audio.shape[0], num_frames * hop_length)
    for row, clip in zip(audio, clips, strict=True):
        row[:, : clip.audio.shape[-1]] = clip.audio
        row[:, clip.audio.shape[-1] :] = 0
    return Batch(
        audio=audio,
        audio_lengths=audio_lengths,
        text_tokens=_pad_tokens([clip.tokens for clip in clips]),
        text_lengths=torch.tensor([len(clip.tokens) for clip in clips]),
        task_ids=torch.tensor([clip.task_id for clip in clips]),
        quantizer_units=torch.tensor([clip.ref.quantizer_unit for clip in clips], dtype=torch.float32),
        crop_units=torch.tensor([clip.ref.crop_unit for clip in clips], dtype=torch.float32),
        sample_ids=tuple(clip.sample_id for clip in clips),
        domains=tuple(clip.ref.domain for clip in clips),
    )


def _pad_tokens(tokens: Sequence[Sequence[int]]) -> Tensor:
    longest = max(len(row) for row in tokens)
    padded = [[*row, *[0] * (longest - len(row))] for row in tokens]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(tokens), longest)


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(worker: int) -> None:
    start_worker()  # torch's own watchdog waits until a worker's results are read, which nobody does after a kill
