"""Continuous batched decoding against isolated runs."""

import pytest
import torch

from .small_models import HOP, relative_error, small_model


@pytest.fixture
def model():
    return small_model(11)


def random_codes(frames, seed):
    return torch.randint(0, 32, (4, frames), generator=torch.Generator().manual_seed(seed))


def test_rows_join_at_the_end_and_leave_when_finalized(model):
    streams = {name: random_codes(60, seed) for seed, name in enumerate("abcd")}
    position, received = dict.fromkeys(streams, 0), {name: [] for name in streams}
    calls = [  # rows with their numbers of frames, and the rows that end
        ([("a", 20), ("b", 3)], []),
        ([("a", 20), ("b", 12), ("c", 1)], []),
        ([("a", 5), ("b", 20), ("c", 20)], [0]),
        ([("b", 10), ("c", 1), ("d", 33)], [0, 1]),
        ([("d", 9)], []),
    ]
    for number, (rows, ending) in enumerate(calls):
        chunks = []
        for name, frames in rows:
            chunks.append(streams[name][:, position[name] : position[name] + frames])
            position[name] += frames
        first = {"max_batch_size": 3, "reset_stream": True} if number == 0 else {}
        output = model.batch_decode(chunks, streaming=True, finalize_indices=ending, **first)
        assert output.audio_lengths.tolist() == [frames * HOP for _, frames in rows]
        for row, (name, frames) in enumerate(rows):
            received[name].append(output.audio[row, :, : frames * HOP])
    for name, parts in received.items():
        alone = model.decode(streams[name][:, : position[name]]).audio[0]
        assert relative_error(torch.cat(parts, dim=1), alone) < 1e-5


def test_reset_begins_anew(model):
    codes = [random_codes(10, 1), random_codes(10, 2)]
    first = model.batch_decode(codes, streaming=True)
    second = model.batch_decode(codes, streaming=True)
    assert not torch.allclose(first.audio, second.audio)
    again = model.batch_decode(codes[:1], streaming=True, reset_stream=True, max_batch_size=1)
    assert relative_error(again.audio, first.audio[:1]) < 1e-5


def test_illegal_calls_are_refused(model):
    codes = [random_codes(2, seed) for seed in range(3)]
    for option in ({"max_batch_size": 2}, {"reset_stream": True}, {"finalize_indices": [0]}):
        with pytest.raises(ValueError, match="need streaming=True"):
            model.batch_decode(codes, **option)
    with pytest.raises(ValueError, match="3 rows of codes for 0 active rows and max_batch_size=2"):
        model.batch_decode(codes, streaming=True, max_batch_size=2)
    model.batch_decode(codes[:2], streaming=True, max_batch_size=3)
    with pytest.raises(ValueError, match="1 rows of codes for 2 active rows"):
        model.batch_decode(codes[:1], streaming=True)
    with pytest.raises(ValueError, match="max_batch_size is 3 until"):
        model.batch_decode(codes, streaming=True, max_batch_size=4)
    with pytest.raises(ValueError, match=r"finalize_indices \[2\] must lie in 0..1"):
        model.batch_decode(codes[:2], streaming=True, finalize_indices=[2])
    with pytest.raises(ValueError, match="equal n"):
        model.batch_decode([codes[0], codes[1][:2]], streaming=True)
    with pytest.raises(ValueError, match="chunk_duration cannot be combined"):
        model.batch_decode(codes[:2], streaming=True, chunk_duration=0.1)
