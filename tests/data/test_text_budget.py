"""Long texts: dropped above a limit, and batched separately from short ones below it."""

from pathlib import Path

import pytest
import torch

from moss_train.batch import UpdateBatch
from moss_train.data.stream.loader import PREFETCH_BYTES, make_loader, prefetch_within, split_by_text
from moss_train.data.stream.sample_reader import StreamCounter, TrainingClip
from moss_train.data.stream.stream import AudioStream, ClipFormat
from tests.data.packed_clips import count_update

HOP = 1920
FORMAT = ClipFormat(24000, 1, HOP)


def clip(num_tokens: int, seconds: float = 0.8) -> TrainingClip:
    task = 0 if num_tokens else -1
    return TrainingClip(None, "", torch.zeros(1, round(24000 * seconds)), tuple(range(num_tokens)), task)  # type: ignore[arg-type]


def positions(clips: list[TrainingClip]) -> int:
    each = [-(-clip.audio.shape[1] // HOP) + len(clip.tokens) for clip in clips if clip.tokens]
    return len(each) * max(each, default=0)


def test_a_long_text_does_not_make_the_others_as_long() -> None:
    clips = [clip(n) for n in (20, 0, 900, 30, 25, 0, 40)]
    assert positions(clips) == 5 * 910
    parts = split_by_text(clips, HOP, 1000)
    assert [[len(one.tokens) for one in part] for part in parts] == [[900], [20, 0, 30, 25, 0, 40]]
    assert all(positions(part) <= 1000 for part in parts)
    assert split_by_text(clips, HOP, 10_000) == [clips]
    assert split_by_text([clip(0), clip(0)], HOP, 1)[0][1].tokens == ()
    assert split_by_text([], HOP, 1000) == []


def load(packed: Path, max_text_tokens: int | None) -> UpdateBatch:
    stream = AudioStream([packed], FORMAT, crop_seconds=1.0)
    options = {"position": 0, "updates": [(0, 30.0)], "micro_batch_seconds": 10.0}
    encode = lambda text: text.encode()  # noqa: E731
    return next(iter(make_loader(stream, text_encoder=encode, max_text_tokens=max_text_tokens, **options)))


def test_a_clip_with_too_long_a_text_is_used_without_it_and_counted(packed: Path) -> None:
    free = load(packed, None)
    lengths = {
        name: int(length)
        for micro in free.micro_batches
        for name, length in zip(micro.sample_ids, micro.text_lengths, strict=True)
    }
    limit = sorted(length for length in lengths.values() if length)[-2]
    bounded = load(packed, limit)
    longer = {name for name, length in lengths.items() if length > limit}
    assert set(bounded.without_text) == longer != set()
    assert free.without_text == ()
    for micro in bounded.micro_batches:
        for name, length, task in zip(micro.sample_ids, micro.text_lengths.tolist(), micro.task_ids, strict=True):
            assert length == (0 if name in longer else lengths[name])
            assert (task >= 0) == (length > 0)
    audio = [sorted(micro.audio_lengths.sum() for micro in update.micro_batches) for update in (free, bounded)]
    assert sum(audio[0]) == sum(audio[1])
    counter = StreamCounter(24000)
    lines = count_update(counter, bounded)
    assert len(lines) == counter.num_without_text == len(longer)
    again = StreamCounter(24000)
    again.load_state_dict(counter.state_dict())
    assert again.num_without_text == len(longer)


@pytest.mark.parametrize(
    ("seconds", "workers", "expected"),
    [(280.0, 8, (8, 2)), (18000.0, 8, (4, 1)), (18000.0, 0, (0, 2)), (1e6, 8, (1, 1))],
)
def test_what_workers_hold_ready_is_bounded(seconds: float, workers: int, expected: tuple[int, int]) -> None:
    found = prefetch_within(FORMAT, seconds, workers)
    assert found == expected
    assert found[0] * found[1] * seconds * 24000 * 4 <= PREFETCH_BYTES or found == (1, 1)
