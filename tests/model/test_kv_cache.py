"""Ring buffers of the streaming state: which frames a query attends to, and that nothing else is written or moved."""

import pytest
import torch

from moss_train.model.kv_cache import StageState, StreamChunk

WINDOW = 8


def new_state(batch=3, longest_step=4, seed=0):
    ring = torch.randn(batch, WINDOW + longest_step, 4, 3, generator=torch.Generator().manual_seed(seed))
    return StageState(torch.zeros(batch, dtype=torch.int64), [ring], WINDOW)


def visible_frames(state, frames, num_frames=None):
    """Return for every item and query the numbers of the visible frames; keys are the frames' own numbers."""
    chunk = StreamChunk(state, frames, num_frames)
    seen = [[] for _ in state.position]
    for step in chunk.steps:
        numbers = chunk.positions[:, :, None, None].expand(-1, -1, 4, 3).float()
        keys = step.write(state.rings[0], numbers)
        for item in range(len(seen)):
            for query in range(step.stop - step.start):
                slots = step.mask[item, 0, query] == 0
                seen[item].append(sorted(keys[item, 0, slots, 0].tolist()))
    chunk.advance()
    return seen


@pytest.mark.parametrize("sizes", [[1] * 30, [4] * 8, [3, 1, 4, 2, 4, 4, 1, 4], [9, 1, 20, 2], [50]])
def test_every_query_sees_the_last_window(sizes):
    state, start = new_state(), 0
    for size in sizes:
        seen = visible_frames(state, size)
        for item in seen:
            for number, frames in enumerate(item, start):
                assert frames == list(range(max(0, number - WINDOW + 1), number + 1))
        start += size
    assert state.position.tolist() == [start] * 3


def test_items_advance_by_their_own_frames():
    state, counts = new_state(), [0, 0, 0]
    for size, valid in [(4, [4, 0, 2]), (10, [1, 10, 0]), (1, [1, 0, 1]), (7, [0, 7, 3]), (20, [20, 3, 1])]:
        seen = visible_frames(state, size, torch.tensor(valid))
        for item, num in enumerate(valid):
            for number, frames in enumerate(seen[item][:num], counts[item]):
                assert frames == list(range(max(0, number - WINDOW + 1), number + 1))
            counts[item] += num
        assert state.position.tolist() == counts


def test_items_without_frames_are_not_written():
    state = new_state()
    visible_frames(state, 6)
    before = state.rings[0].clone()
    visible_frames(state, 13, torch.zeros(3, dtype=torch.int64))
    assert state.position.tolist() == [6, 6, 6]
    assert torch.equal(state.rings[0][:, :-1], before[:, :-1])


def test_reset_hides_what_an_item_has_seen():
    state = new_state()
    visible_frames(state, 11)
    state.reset(torch.tensor([False, True, False]))
    seen = visible_frames(state, 2)
    assert seen[1] == [[0], [0, 1]]
    assert seen[0] == [list(range(4, 12)), list(range(5, 13))]


def test_slots_that_were_never_filled_are_not_looked_at():
    state = new_state(longest_step=9)  # 16 slots, seen in eighths
    assert [StreamChunk(state, frames, None).steps[0].mask.shape[3] for frames in (1, 2, 3, 9)] == [2, 2, 4, 10]
    visible_frames(state, 5)
    assert StreamChunk(state, 1, None).steps[0].mask.shape[3] == 6
    visible_frames(state, 60)
    assert StreamChunk(state, 1, None).steps[0].mask.shape[3] == 16
    state.reset(torch.tensor([True, False, True]))
    assert StreamChunk(state, 1, None).steps[0].mask.shape[3] == 16
    state.reset(torch.tensor([True, True, True]))
    assert StreamChunk(state, 1, None).steps[0].mask.shape[3] == 2
