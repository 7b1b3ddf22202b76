"""The training loader: the main process plans, workers only read, so their number does not affect the batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from moss_train.batch import Batch, UpdateBatch
from moss_train.data.stream.sample_reader import SampleReader, TextEncoder, TrainingClip
from moss_train.data.stream.stream import AudioStream, ClipFormat, UpdatePlan, split_by_length
from moss_train.utils.errors import InvalidSample, SampleError, UserError
from moss_train.utils.workers import init_loader_worker, num_cores

LM_POSITIONS_PER_SECOND = 50
"""Maximum number of positions of the text LM in a micro-batch per second of `micro_batch_seconds`: one long text makes
every other clip with text as long. Audio has 12.5 positions per second, speech about 15 text tokens per second."""

PREFETCH_BYTES = 8 * 2**30
"""Maximum bytes of audio that the workers of one process may prefetch."""

WORKER_TIMEOUT_SECONDS = 600
"""If a worker delivers nothing for this long, it hangs, for example on a dead network file system, and the run stops
with an error."""

PlannedUpdate = tuple[int, UpdatePlan]


@dataclass(eq=False)
class _PlanSampler(Sampler[PlannedUpdate]):
    """Yields (update, plan) for consecutive updates, planned one at a time from a position of the stream."""

    stream: AudioStream
    position: int
    updates: Sequence[tuple[int, float]]
    micro_batch_seconds: float
    rank: int
    world_size: int

    def __len__(self) -> int:
        return len(self.updates)

    def __iter__(self) -> Iterator[PlannedUpdate]:
        position = self.position
        for update, batch_seconds in self.updates:
            plan = self.stream.plan_update(
                position, batch_seconds, self.micro_batch_seconds, self.rank, self.world_size
            )
            position = plan.next_position
            yield update, plan


@dataclass(eq=False)
class _PlannedUpdates(Dataset[UpdateBatch]):
    """Reads planned updates; the result names the clips and texts that were left out."""

    clip_format: ClipFormat
    reader: SampleReader
    max_lm_positions: int

    def __getitem__(self, item: PlannedUpdate) -> UpdateBatch:
        update, plan = item
        batches: list[Batch] = []
        dropped: list[InvalidSample] = []
        without_text: list[str] = []
        for refs in plan.micro_batches:
            clips: list[TrainingClip] = []
            for ref in refs:
                try:
                    clips.append(self.reader.read(ref))
                except SampleError as error:
                    dropped.append(InvalidSample(error.clip_id, error.reason, error.fault))
            without_text += [clip.sample_id for clip in clips if clip.is_text_too_long]
            parts = split_by_text(clips, self.clip_format.hop_length, self.max_lm_positions)
            batches += [collate(part, self.clip_format) for part in parts]
        return UpdateBatch(tuple(batches), update, plan.next_position, tuple(dropped), tuple(without_text))


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
    max_text_tokens: int | None = None,
    pin_memory: bool = False,
) -> DataLoader[UpdateBatch]:
    """Make the loader of one rank: one UpdateBatch for every (update, batch_seconds) of `updates`, in order.

    The items are the same to the last bit for any number of workers (at most one per core is started), and the ranks
    together get the same clips for any world size. An update whose clips on this rank are all unreadable has no
    micro-batches. Clips with text are used whole but without their text if there is no text encoder, or if the text has
    more than `max_text_tokens` tokens. `pin_memory` is for training on a GPU. Raises UserError when a clip is longer
    than `micro_batch_seconds`.
    """
    check_longest(stream, micro_batch_seconds)
    longest_update = max((seconds for _, seconds in updates), default=0.0) / world_size
    num_workers, prefetch = prefetch_within(stream.clip_format, longest_update, min(num_workers, num_cores()))
    reader = SampleReader(stream.clip_format, text_encoder, max_text_tokens)
    max_lm_positions = round(LM_POSITIONS_PER_SECOND * micro_batch_seconds)
    return DataLoader(
        _PlannedUpdates(stream.clip_format, reader, max_lm_positions),
        sampler=_PlanSampler(stream, position, updates, micro_batch_seconds, rank, world_size),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        worker_init_fn=init_loader_worker,
        timeout=WORKER_TIMEOUT_SECONDS if num_workers else 0,
        pin_memory=pin_memory,
    )


def prefetch_within(clip_format: ClipFormat, seconds: float, num_workers: int) -> tuple[int, int]:
    """Return the number of workers and of updates that each prefetches, so that updates of `seconds` audio seconds fit
    into `PREFETCH_BYTES`.

    At least one worker remains (unless none are wanted), and each prefetches one or two updates.
    """
    rate = clip_format.sampling_rate
    rate += clip_format.stored_rate if clip_format.output_ratio > 1 else 0
    size = max(1.0, 4 * seconds * rate * clip_format.num_channels)
    workers = max(min(num_workers, 1), min(num_workers, int(PREFETCH_BYTES / size)))
    return workers, min(2, max(1, int(PREFETCH_BYTES / (size * max(1, workers)))))


def split_by_text(clips: Sequence[TrainingClip], hop_length: int, max_positions: int) -> list[list[TrainingClip]]:
    """Split a micro-batch with more than `max_positions` of the text LM: clips with text times the longest of them.

    The few long texts are then separated from the short ones; clips without text stay with the shortest. Without clips,
    the result is empty.
    """
    with_text = [clip for clip in clips if clip.tokens]
    positions = {id(clip): -(-clip.audio.shape[-1] // hop_length) + len(clip.tokens) for clip in with_text}
    with_text.sort(key=lambda clip: -positions[id(clip)])
    parts = split_by_length(np.array([positions[id(clip)] for clip in with_text], np.int64), max_positions, 0.0)
    if len(parts) < 2:
        return [list(clips)] if clips else []
    apart = [{id(with_text[i]) for i in part} for part in parts]
    first_parts = set().union(*apart[:-1])
    groups = [[clip for clip in clips if id(clip) in part] for part in apart[:-1]]
    return [*groups, [clip for clip in clips if id(clip) not in first_parts]]


def check_longest(stream: AudioStream, micro_batch_seconds: float) -> None:
    """Raise UserError when a single clip is longer than a micro-batch may be."""
    if stream.longest_seconds > micro_batch_seconds:
        raise UserError(
            f"data.micro_batch_seconds={micro_batch_seconds} is less than the longest clip used, "
            f"{stream.longest_seconds:.2f} s; raise it, or lower data.crop_seconds (clips without text) or "
            "data.max_seconds (clips with text)"
        )


def collate(clips: Sequence[TrainingClip], clip_format: ClipFormat) -> Batch:
    """Pad clips to one length, a whole number of frames, and their tokens to one length."""
    audio_lengths = torch.tensor([clip.audio.shape[-1] for clip in clips])
    num_samples = -(-int(audio_lengths.max()) // clip_format.hop_length) * clip_format.hop_length
    targets = [clip.target for clip in clips if clip.target is not None]
    return Batch(
        audio=_pad_audio([clip.audio for clip in clips], num_samples),
        audio_lengths=audio_lengths,
        text_tokens=pad_sequence([torch.tensor(clip.tokens, dtype=torch.int64) for clip in clips], batch_first=True),
        text_lengths=torch.tensor([len(clip.tokens) for clip in clips]),
        task_ids=torch.tensor([clip.task_id for clip in clips]),
        quantizer_uniform=torch.tensor([clip.ref.quantizer_uniform for clip in clips], dtype=torch.float32),
        crop_uniform=torch.tensor([clip.ref.crop_uniform for clip in clips], dtype=torch.float32),
        sample_ids=tuple(clip.sample_id for clip in clips),
        domains=tuple(clip.ref.domain for clip in clips),
        target=_pad_audio(targets, num_samples * clip_format.output_ratio) if targets else None,
        target_lengths=torch.tensor([target.shape[-1] for target in targets]) if targets else None,
    )


def _pad_audio(clips: Sequence[Tensor], num_samples: int) -> Tensor:
    padded = clips[0].new_empty(len(clips), clips[0].shape[0], num_samples)
    for row, clip in zip(padded, clips, strict=True):
        row[:, : clip.shape[-1]] = clip
        row[:, clip.shape[-1] :] = 0
    return padded
