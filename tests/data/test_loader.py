"""The loader: identical bits for any number of workers and after any resume; bad samples are reported by name."""

import resource
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moss_train.audio.io import read_audio
from moss_train.batch import TASKS, UpdateBatch
from moss_train.data.shards.index import ShardIndex
from moss_train.data.stream.loader import make_loader
from moss_train.data.stream.stream import AudioStream, ClipFormat
from moss_train.utils.errors import UserError
from moss_train.utils.workers import num_cores
from tests.data.packed_clips import iterate_clips

from ..faults.harness import assert_equal, is_alive, wait_for_numbers

UPDATES = [(number, 8.0 if number < 3 else 12.0) for number in range(6)]


def encode(text: str) -> list[int]:
    return list(text.encode())


def make_stream(packed: Path, peak: float | None = None) -> AudioStream:
    return AudioStream([packed], ClipFormat(24000, 1, 1920, peak), crop_seconds=0.9, max_seconds=5.0, seed=4)


def load(
    packed: Path, position: int = 0, updates: Sequence[tuple[int, float]] = UPDATES, **options
) -> list[UpdateBatch]:
    options = {"text_encoder": encode, "micro_batch_seconds": 6.0} | options
    return list(make_loader(make_stream(packed), position=position, updates=updates, **options))


@pytest.fixture(scope="module")
def uninterrupted(packed: Path) -> list[UpdateBatch]:
    return load(packed)


def test_batches_hold_what_they_promise(packed: Path, recordings: Path, uninterrupted: list[UpdateBatch]) -> None:
    texts = {sample_id: labels for sample_id, _, labels in iterate_clips([packed], sampling_rate=24000, num_channels=1)}
    assert [update.update for update in uninterrupted] == [number for number, _ in UPDATES]
    seen_text = 0
    for batch in (batch for update in uninterrupted for batch in update.micro_batches):
        num_clips, num_channels, num_samples = batch.audio.shape
        assert (num_channels, num_samples % 1920) == (1, 0)
        assert num_samples - batch.audio_lengths.max() < 1920
        assert batch.num_clips == num_clips == len(batch.domains)
        assert (batch.audio.dtype, batch.audio_lengths.dtype) == (torch.float32, torch.int64)
        for i, sample_id in enumerate(batch.sample_ids):
            length = int(batch.audio_lengths[i])
            assert not batch.audio[i, :, length:].any()
            labels = texts[sample_id]
            assert batch.domains[i] == labels["domain"]
            if batch.text_lengths[i] == 0:
                assert batch.task_ids[i] == -1
                continue
            seen_text += 1
            assert torch.equal(batch.audio[i, :, :length], read_audio(recordings / sample_id)[0])
            assert TASKS[batch.task_ids[i]] == labels["task"]
            tokens = batch.text_tokens[i]
            assert bytes(tokens[: batch.text_lengths[i]].tolist()).decode() == labels["text"]
            assert not tokens[batch.text_lengths[i] :].any()
    assert seen_text > 5


@pytest.mark.parametrize(("stop", "num_workers"), [(1, 0), (3, 2), (5, 1)])
def test_a_resume_continues_bit_for_bit(
    packed: Path, uninterrupted: list[UpdateBatch], stop: int, num_workers: int
) -> None:
    position = uninterrupted[stop - 1].next_position
    rest = load(packed, position, UPDATES[stop:], num_workers=num_workers)
    for ours, theirs in zip(rest, uninterrupted[stop:], strict=True):
        assert_equal(ours, theirs)


def test_ranks_share_the_samples_of_one_process(packed: Path, uninterrupted: list[UpdateBatch]) -> None:
    def contents(updates: list[UpdateBatch], number: int) -> dict[tuple, Tensor]:
        batches = updates[number].micro_batches
        return {
            (sample_id, float(batch.quantizer_uniform[i])): batch.audio[i, :, : int(batch.audio_lengths[i])]
            for batch in batches
            for i, sample_id in enumerate(batch.sample_ids)
        }

    ranks = [load(packed, rank=rank, world_size=3) for rank in range(3)]
    for number, alone in enumerate(uninterrupted):
        together = [contents(rank, number) for rank in ranks]
        expected = contents(uninterrupted, number)
        assert sum(len(part) for part in together) == len(expected)
        merged = together[0] | together[1] | together[2]
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[key], expected[key]) for key in expected)
        assert {rank[number].next_position for rank in ranks} == {alone.next_position}


def test_a_resume_in_another_world_continues_with_the_same_samples(
    packed: Path, uninterrupted: list[UpdateBatch]
) -> None:
    position = uninterrupted[2].next_position  # so far with 1 rank, from here with 2 ranks of one worker each
    ranks = [load(packed, position, UPDATES[3:], rank=rank, world_size=2, num_workers=1) for rank in range(2)]
    for alone, together in zip(uninterrupted[3:], zip(*ranks, strict=True), strict=True):
        ids = [name for part in together for batch in part.micro_batches for name in batch.sample_ids]
        assert sorted(ids) == sorted(name for batch in alone.micro_batches for name in batch.sample_ids)
        assert {part.next_position for part in together} == {alone.next_position}


def test_the_loader_has_a_length_and_starts_anew(packed: Path, uninterrupted: list[UpdateBatch]) -> None:
    loader = make_loader(make_stream(packed), text_encoder=encode, position=0, updates=UPDATES, micro_batch_seconds=6.0)
    assert len(loader) == len(UPDATES)
    for _ in range(2):
        assert_equal(next(iter(loader)), uninterrupted[0])


def test_a_clip_longer_than_a_micro_batch_is_refused(packed: Path) -> None:
    with pytest.raises(UserError, match=r"micro_batch_seconds=2\.0 is less than the longest clip used, \d\.\d\d s"):
        load(packed, micro_batch_seconds=2.0)


def damaged_copy(packed: Path, folder: Path) -> Path:
    """Copy shards and overwrite a few bytes in the middle of every tenth clip."""
    copy = Path(shutil.copytree(packed, folder / "copy"))
    index = ShardIndex.load(copy)
    for row in range(0, len(index), 10):
        location = index.locate(row)
        with Path(location.shard).open("r+b") as file:
            file.seek(location.audio_offset + location.audio_size // 2)
            file.write(b"\x00\xff" * 8)
    return copy


def test_damaged_audio_is_dropped_by_name_and_the_rest_stays(
    packed: Path, tmp_path: Path, uninterrupted: list[UpdateBatch]
) -> None:
    copy = damaged_copy(packed, tmp_path)
    updates = load(copy, num_workers=1)
    dropped = [entry for update in updates for entry in update.dropped]
    assert dropped
    assert all(sample_id.endswith(".flac") and "damaged" in reason for sample_id, reason, _ in dropped)
    for ours, intact in zip(updates, uninterrupted, strict=True):
        ids = sorted(sample_id for batch in ours.micro_batches for sample_id in batch.sample_ids)
        lost = [sample_id for sample_id, *_ in ours.dropped]
        assert sorted(ids + lost) == sorted(
            sample_id for batch in intact.micro_batches for sample_id in batch.sample_ids
        )
        assert ours.next_position == intact.next_position
    with pytest.raises(UserError, match=r"\.tar, clip at byte \d+: .*damaged"):
        list(iterate_clips([copy], sampling_rate=24000, num_channels=1))


def test_a_shard_that_vanishes_is_reported_and_does_not_stop_the_loader(packed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    stream = make_stream(copy)
    shutil.rmtree(copy)
    loader = make_loader(stream, text_encoder=None, position=0, updates=UPDATES[:1], micro_batch_seconds=6.0)
    (update,) = loader
    assert update.micro_batches == ()
    assert len(update.dropped) == update.next_position
    assert all("No such file" in reason for _, reason, _ in update.dropped)


def test_a_text_encoder_that_fails_loses_only_the_clips_with_text(packed: Path) -> None:
    def broken(text: str) -> list[int]:
        raise KeyError(text)

    updates = load(packed, text_encoder=broken)
    reasons = {reason.split(":")[0] for update in updates for _, reason, _ in update.dropped}
    assert reasons == {"the text encoder raised KeyError"}
    assert all(not batch.text_lengths.any() for update in updates for batch in update.micro_batches)
    empty = load(packed, text_encoder=lambda text: [])
    assert {reason for update in empty for _, reason, _ in update.dropped} == {"the text encoder gives no tokens"}


def test_clips_are_scaled_to_the_peak_and_silence_stays(packed: Path) -> None:
    stream = make_stream(packed, peak=0.7)
    loader = make_loader(stream, text_encoder=encode, position=0, updates=UPDATES[:2], micro_batch_seconds=6.0)
    peaks = torch.cat([batch.audio.abs().amax(dim=(1, 2)) for update in loader for batch in update.micro_batches])
    loud = peaks[peaks > 0]
    assert torch.allclose(loud, torch.full_like(loud, 0.7))


def test_moving_keeps_everything(uninterrupted: list[UpdateBatch]) -> None:
    """The original batch still returns its lengths, also after a second move."""
    update = uninterrupted[0]
    moved = update.to("cpu").to("cpu")
    assert all(there.host is here for there, here in zip(moved.micro_batches, update.micro_batches, strict=True))
    without = tuple(replace(batch, host=None) for batch in moved.micro_batches)
    assert_equal(replace(moved, micro_batches=without), update)
    meta = update.to("meta").micro_batches[0]
    assert {value.device.type for value in vars(meta).values() if isinstance(value, Tensor)} == {"meta"}


def test_large_updates_need_few_open_files(packed: Path) -> None:
    """Each tensor in shared memory keeps a file open; one update would exceed the usual limit of 1024."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, limits[1]))
    try:
        (update,) = load(packed, updates=[(0, 150.0)], num_workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(update.micro_batches) > 30
    assert_equal(update, load(packed, updates=[(0, 150.0)])[0])


def test_workers_end_when_the_training_process_is_killed(launcher, packed, tmp_path):
    """Their results do not fit into a pipe, so a worker waiting for a reader would wait for ever."""
    script = f"""
import time
from moss_train.data.stream.loader import make_loader
from moss_train.data.stream.stream import AudioStream, ClipFormat
stream = AudioStream([{str(packed)!r}], ClipFormat(24000, 1, 1920), crop_seconds=5.0, max_seconds=10.0)
updates = [(i, 60.0) for i in range(100)]
loader = make_loader(stream, text_encoder=None, position=0, updates=updates, micro_batch_seconds=60, num_workers=1)
batches = iter(loader)
next(batches)
print(batches._workers[0].pid, flush=True)
time.sleep(60)
"""
    (tmp_path / "script.py").write_text(script)
    job = launcher.start_script(tmp_path / "script.py")
    (worker,) = wait_for_numbers(job)
    job.send(signal.SIGKILL)
    job.wait()
    deadline = time.monotonic() + 15
    while is_alive(worker):
        assert time.monotonic() < deadline, f"worker {worker} outlives its parent"
        time.sleep(0.1)


def test_no_more_workers_start_than_there_are_cores(packed: Path) -> None:
    options = {"text_encoder": encode, "micro_batch_seconds": 6.0, "num_workers": 500}
    loader = make_loader(make_stream(packed), position=0, updates=UPDATES, **options)
    assert loader.num_workers == num_cores()
