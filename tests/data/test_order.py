"""The order of clips and domains: shares, passes and seeking, with tables much longer than any test corpus."""

import numpy as np
import pytest

from moss_train.data.stream.corpus import DomainMixture, DomainOrder, domain_shares, permutation, uniforms
from moss_train.data.stream.stream import assign_to_rank, split_by_length
from moss_train.utils.errors import UserError


def order_of(counts: list[int], window_shards: int = 3, seed: int = 0) -> DomainOrder:
    firsts = np.cumsum([0, *counts[:-1]])
    return DomainOrder("speech", np.stack([firsts, counts], axis=1), seed=seed, window_shards=window_shards)


def test_units_are_below_one_in_float32_and_depend_on_everything() -> None:
    numbers = uniforms(1, "crop", 5, count=200_000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.astype(np.float32).max() < np.float32(1)
    assert abs(numbers.mean() - 0.5) < 0.003
    assert np.array_equal(numbers, uniforms(1, "crop", 5, count=200_000))
    for other in (uniforms(2, "crop", 5, count=9), uniforms(1, "start", 5, count=9), uniforms(1, "crop", 6, count=9)):
        assert not np.array_equal(other, numbers[:9])


def test_random_numbers_never_change() -> None:
    """A run that is resumed with another NumPy version has to continue the same stream."""
    assert permutation(3, "clips", 1, count=8).tolist() == [7, 6, 2, 3, 5, 1, 4, 0]
    assert (uniforms(3, "crop", 1, count=3) * 2**24).tolist() == [9770868, 2591362, 9085583]


def test_every_pass_visits_every_clip_once_in_another_order() -> None:
    order = order_of([5, 1, 7, 3, 9, 2, 4])
    passes = [order.rows(number * 31, 31).tolist() for number in range(3)]
    assert all(sorted(rows) == list(range(31)) for rows in passes)
    assert passes[0] != passes[1] != passes[2]
    assert order_of([5, 1, 7, 3, 9, 2, 4], seed=1).rows(0, 31).tolist() != passes[0]


def test_any_element_can_be_computed_alone() -> None:
    whole = order_of([5, 1, 7, 3, 9, 2, 4]).rows(0, 100)
    for first, count in ((0, 1), (30, 2), (61, 39), (99, 1)):
        assert np.array_equal(order_of([5, 1, 7, 3, 9, 2, 4]).rows(first, count), whole[first : first + count])
    assert order_of([5, 1, 7]).rows(13 * 10**9 + 4, 1)[0] in range(13)


def test_reading_stays_within_a_window_of_shards() -> None:
    rows = order_of([10] * 20, window_shards=4).rows(0, 200)
    for window in rows.reshape(5, 40):
        assert len(set(window // 10)) == 4
        assert not np.array_equal(window, np.sort(window))


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.3, 0.2], [0.98, 0.01, 0.01], [1 / 40] * 40, [0.9999, 0.0001, 0.0]])
def test_counts_follow_the_shares_at_every_depth(shares: list[float]) -> None:
    mixture = DomainMixture(shares, seed=0)
    for block in (0, 1, 2, 1000, 10**9):
        labels, firsts, counts = mixture.block(block)
        assert np.bincount(labels, minlength=len(shares)).tolist() == counts
        assert min(counts) >= 0
        assert [first + count for first, count in zip(firsts, counts, strict=True)] == mixture.counts_before(block + 1)
        positions = (block + 1) * mixture.block_size
        error = np.array(mixture.counts_before(block + 1)) - np.array(shares) * positions
        assert np.abs(error).max() < len(shares) * (1 + positions * 2.0**-40)


def test_weights_are_shares_of_audio_seconds() -> None:
    lengths = {"music": 10.0, "sound": 2.0, "speech": 5.0}
    weights = {"music": 0.2, "sound": 0.3, "speech": 0.5}
    shares = domain_shares(list(lengths), list(lengths.values()), [1.0, 1.0, 1.0], weights)
    seconds = np.array(shares) * np.array(list(lengths.values()))
    assert np.allclose(seconds / seconds.sum(), list(weights.values()))
    available = domain_shares(["a", "b"], [4.0, 4.0], [300.0, 100.0], None)
    assert available == pytest.approx([0.75, 0.25])


def test_weights_have_to_fit_the_domains() -> None:
    for weights, message in (
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "name the domain 'c', which no shard has; there are a, b"),
        ({"a": 1.0}, "do not name the domain 'b'"),
        ({"a": -1.0, "b": 2.0}, "0 or more"),
        ({"a": 0.0, "b": 0.0}, "not all 0"),
    ):
        with pytest.raises(UserError, match=message):
            domain_shares(["a", "b"], [1.0, 1.0], [1.0, 1.0], weights)


def test_dealing_gives_every_rank_as_much() -> None:
    lengths = np.array([5, 1, 9, 7, 3, 8, 2, 6])
    shares = [assign_to_rank(lengths, rank, 3) for rank in range(3)]
    assert sorted(np.concatenate(shares)) == list(range(8))
    assert [lengths[share].tolist() for share in shares] == [[9, 3, 2], [8, 5, 1], [7, 6]]


def test_micro_batches_are_few_and_even_and_bound_size_and_padding() -> None:
    def split(lengths: list[int], limit: int = 20, ratio: float = 0.7) -> list[list[int]]:
        array = np.array(lengths, np.int64)
        return [array[run].tolist() for run in split_by_length(array, limit, ratio)]

    assert split([30, 10, 10, 9, 8, 6, 6, 2]) == [[30], [10, 10], [9, 8], [6, 6, 2]]
    assert split([12] * 12, limit=120) == [[12] * 6, [12] * 6]  # not ten and two
    assert split([12] * 25, limit=120) == [[12] * 9, [12] * 9, [12] * 7]
    assert split([30, *[2] * 8], limit=300) == [[30], [2] * 8]  # padding of 224 costs more than an additional pass
    assert split([30, 20, 12], limit=300) == [[30, 20, 12]]  # here it does not
    assert split([]) == []


def test_ranks_of_a_cluster_need_no_more_passes_than_their_audio_fills() -> None:
    """64 ranks, 18,000 s: crops of 12 s and, for a third, clips with text of 1 to 30 s. Greedy cutting needed 5.9."""
    random = np.random.default_rng(0)
    texts = np.clip(random.lognormal(1.9, 0.6, 2000), 1, 30)
    lengths = (np.where(random.random(2000) < 0.3, texts, 12.0) * 24000).astype(np.int64)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), 18000 * 24000)) + 1]
    shares = [lengths[assign_to_rank(lengths, rank, 64)] for rank in range(64)]
    runs = [split_by_length(share, 120 * 24000, 0.7) for share in shares]
    assert np.mean([len(part) for part in runs]) < 3.3
    for share, part in zip(shares, runs, strict=True):
        costs = [len(run) * share[run.start] for run in part]
        assert max(costs) <= 120 * 24000
        assert sorted(i for run in part for i in run) == list(range(len(share)))
        assert min(costs) > 0.3 * max(costs)
