"""The training stream over real shards: crops, whole clips with text, mixing, and equal order for every world size."""

from pathlib import Path

import numpy as np
import pytest

from moss_train.data.stream.stream import AudioStream, ClipFormat, SampleRef
from moss_train.utils.errors import UserError

FORMAT = ClipFormat(sampling_rate=24000, num_channels=1, hop_length=1920)


def make_stream(packed: Path, **options: object) -> AudioStream:
    return AudioStream([packed], FORMAT, **({"crop_seconds": 0.5, "max_seconds": 5.0} | options))


def test_a_clip_with_text_is_whole_or_without_its_text(packed: Path) -> None:
    stream = make_stream(packed)
    refs = [stream.sample(position) for position in range(2000)]
    with_text = [ref for ref in refs if ref.with_text]
    too_long = [ref for ref in refs if ref.location.has_text and not ref.with_text]
    assert with_text
    assert too_long
    assert all((ref.start, ref.num_samples) == (0, ref.location.num_samples) for ref in with_text)
    assert all(ref.location.num_samples > 5 * 24000 and ref.num_samples == 12000 for ref in too_long)


def test_without_a_text_lm_clips_with_text_are_cropped_like_all_others(packed: Path) -> None:
    stream = make_stream(packed, uses_text=False)
    samples = [stream.sample(position) for position in range(60)]
    assert any(sample.location.has_text for sample in samples)
    assert not any(sample.with_text for sample in samples)
    assert stream.num_with_text == 0
    assert stream.longest_seconds == 0.5


def test_crops_lie_anywhere_inside_the_clip(packed: Path) -> None:
    stream = make_stream(packed)
    refs = [stream.sample(position) for position in range(2000)]
    crops = [ref for ref in refs if not ref.with_text]
    assert all(ref.num_samples == min(12000, ref.location.num_samples) for ref in crops)
    assert all(0 <= ref.start <= ref.location.num_samples - ref.num_samples for ref in crops)
    places = [ref.start / (ref.location.num_samples - 12000) for ref in crops if ref.location.num_samples > 24000]
    assert min(places) < 0.05
    assert max(places) > 0.95
    assert abs(np.mean(places) - 0.5) < 0.05


def test_random_numbers_belong_to_the_position(packed: Path) -> None:
    first, second = make_stream(packed), make_stream(packed)
    positions = [7, 5000, 10**10]
    assert [first.sample(p) for p in positions] == [second.sample(p) for p in reversed(positions)][::-1]
    refs = [first.sample(position) for position in range(1000)]
    assert len({ref.quantizer_uniform for ref in refs}) > 990
    assert all(0 <= ref.quantizer_uniform < 1 and 0 <= ref.crop_uniform < 1 for ref in refs)
    assert all(ref.quantizer_uniform != ref.crop_uniform for ref in refs)
    assert make_stream(packed, seed=1).sample(7) != first.sample(7)


def test_every_clip_of_a_domain_comes_once_per_pass(packed: Path) -> None:
    stream = make_stream(packed, weights={"music": 0, "sound": 1, "speech": 0})
    count = stream.num_clips["sound"]
    locations = [stream.sample(position).location for position in range(2 * count)]
    assert len(set(locations[:count])) == len(set(locations[count:])) == count


@pytest.mark.parametrize(
    "weights", [{"music": 0.6, "sound": 0.3, "speech": 0.1}, {"music": 1, "sound": 1, "speech": 1}]
)
def test_domains_get_their_share_of_the_seconds(packed: Path, weights: dict[str, float]) -> None:
    stream = make_stream(packed, weights=weights)
    refs = [stream.sample(position) for position in range(30_000)]
    seconds = {domain: sum(ref.num_samples for ref in refs if ref.domain == domain) for domain in weights}
    for domain, weight in weights.items():
        assert seconds[domain] / sum(seconds.values()) == pytest.approx(weight / sum(weights.values()), abs=0.01)


def test_an_update_takes_what_its_batch_seconds_need(packed: Path) -> None:
    stream = make_stream(packed)
    plan = stream.plan_update(100, batch_seconds=20.0, micro_batch_seconds=6.0)
    refs = [ref for group in plan.micro_batches for ref in group]
    assert sorted(ref.position for ref in refs) == list(range(100, plan.next_position))
    lengths = [stream.sample(position).num_samples for position in range(100, plan.next_position)]
    assert sum(lengths) >= 20 * 24000 > sum(lengths[:-1])
    for group in plan.micro_batches:
        longest = max(ref.num_samples for ref in group)
        assert len(group) * longest <= 6 * 24000


def positions_of(stream: AudioStream, world_size: int, batch_seconds: float) -> list[list[int]]:
    """Return the positions that three updates use, over all ranks."""
    updates, position = [], 1000
    for _ in range(3):
        plans = [stream.plan_update(position, batch_seconds, 6.0, rank, world_size) for rank in range(world_size)]
        assert len({plan.next_position for plan in plans}) == 1
        refs: list[SampleRef] = [ref for plan in plans for group in plan.micro_batches for ref in group]
        updates.append(sorted(ref.position for ref in refs))
        position = plans[0].next_position
    return updates


def test_every_world_size_reads_the_same_sequence(packed: Path) -> None:
    stream = make_stream(packed)
    expected = positions_of(stream, 1, batch_seconds=12.0)
    assert positions_of(stream, 2, batch_seconds=12.0) == positions_of(stream, 4, batch_seconds=12.0) == expected
    assert [position for positions in expected for position in positions] == list(range(1000, expected[-1][-1] + 1))


def test_more_ranks_than_samples_leave_the_sequence_as_it_is(packed: Path) -> None:
    stream = make_stream(packed)
    expected = positions_of(stream, 1, batch_seconds=1.6)
    assert all(1 <= len(positions) < 7 for positions in expected)
    assert positions_of(stream, 7, batch_seconds=1.6) == expected
    plans = [stream.plan_update(1000, 1.6, 6.0, rank, 7) for rank in range(7)]
    assert sum(not plan.micro_batches for plan in plans) == 7 - len(expected[0])
    assert positions_of(stream, 1, batch_seconds=0.0001) == [[1000], [1001], [1002]]


@pytest.mark.parametrize("world_size", [2, 5, 8])
def test_ranks_get_equal_seconds(packed: Path, world_size: int) -> None:
    stream = make_stream(packed)
    for position in (0, 777, 12_345):
        plans = [stream.plan_update(position, 120.0, 6.0, rank, world_size) for rank in range(world_size)]
        refs = [[ref for group in plan.micro_batches for ref in group] for plan in plans]
        counts = [len(part) for part in refs]
        seconds = [sum(ref.num_samples for ref in part) / 24000 for part in refs]
        used = [ref.num_samples / 24000 for part in refs for ref in part]
        assert max(counts) - min(counts) <= 1
        assert max(seconds) - min(seconds) <= max(used) - min(used)


def test_folders_are_read_together(packed: Path) -> None:
    one, two = make_stream(packed), AudioStream([packed, packed], FORMAT, crop_seconds=0.5)
    assert two.num_clips == {domain: 2 * count for domain, count in one.num_clips.items()}


@pytest.mark.parametrize(
    ("clip_format", "options", "message"),
    [
        (ClipFormat(48000, 1, 1920), {}, r"sampling_rate=24000 num_channels=1, the model needs sampling_rate=48000"),
        (ClipFormat(24000, 2, 1920), {}, r"pack the audio again with sampling_rate=24000 num_channels=2"),
        (FORMAT, {"weights": {"noise": 1.0}}, r"'noise', which no shard has; there are music, sound, speech"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    packed: Path, clip_format: ClipFormat, options: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        AudioStream([packed], clip_format, **({"crop_seconds": 0.5} | options))


def test_no_folder_is_refused(packed: Path, recordings: Path) -> None:
    with pytest.raises(UserError, match="no clips"):
        AudioStream([], FORMAT, crop_seconds=0.5)
    with pytest.raises(UserError, match="not a folder of packed shards"):
        AudioStream([packed, recordings], FORMAT, crop_seconds=0.5)
