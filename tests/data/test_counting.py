"""Bad samples of every kind, made in real shards and read by the loader: named once, counted, limited in number."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moss_train.batch import UpdateBatch
from moss_train.data.shards.index import ClipLocation, ShardIndex
from moss_train.data.stream import sample_reader as counting
from moss_train.data.stream.loader import make_loader
from moss_train.data.stream.sample_reader import StreamCounter
from moss_train.data.stream.stream import AudioStream, ClipFormat
from moss_train.utils.errors import Fault, InvalidSample, UserError
from tests.data.packed_clips import count_update

CLIP_FORMAT = ClipFormat(24000, 1, 1920)


def overwrite(location: ClipLocation, offset: int, content: bytes) -> None:
    with Path(location.shard).open("r+b") as file:
        file.seek(offset)
        file.write(content)


DAMAGES: dict[str, Callable[[ClipLocation], None]] = {
    "tar header": lambda clip: overwrite(clip, clip.audio_offset - 400, b"\xff" * 16),
    "JSON": lambda clip: overwrite(clip, clip.json_offset, b"}"),
    "index": lambda clip: overwrite(clip, clip.json_offset, b'{"id": "x"}' + b" " * (clip.json_size - 11)),
    "audio": lambda clip: overwrite(clip, clip.audio_offset + clip.audio_size // 2, b"\x00\xff" * 8),
    "file": lambda clip: os.unlink(clip.shard),
}


def updates_of(
    folder: Path, damage: Callable[[ClipLocation], None] | None = None, text_encoder=None
) -> list[UpdateBatch]:
    stream = AudioStream([folder], CLIP_FORMAT, crop_seconds=0.9, max_seconds=8.0)
    index = ShardIndex.load(folder)
    for row in range(0, len(index), 7):
        if damage and Path(index.locate(row).shard).exists():
            damage(index.locate(row))
    updates = [(number, 20.0) for number in range(4)]
    return list(make_loader(stream, text_encoder=text_encoder, position=0, updates=updates, micro_batch_seconds=10.0))


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_counted_by_kind_and_named_once(packed: Path, tmp_path: Path, kind: str) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    updates = updates_of(copy, DAMAGES[kind])
    counter = StreamCounter(24000, max_invalid_fraction=1.0)
    lines = [line for update in updates * 2 for line in count_update(counter, update)]
    lost = [sample_id for update in updates for sample_id, *_ in update.dropped]
    assert counter.invalid == {kind: 2 * len(lost)}
    assert lost
    assert len(lines) == len(set(lost))
    assert all(line.startswith("skipped ") for line in lines)


def test_other_reasons_have_a_kind_too(packed: Path) -> None:
    counter = StreamCounter(24000, max_invalid_fraction=1.0)
    for update in updates_of(packed, text_encoder=lambda text: []):
        count_update(counter, update)
    assert list(counter.invalid) == ["text"]


def test_hours_are_those_of_the_clips(packed: Path) -> None:
    updates = updates_of(packed)
    counter = StreamCounter(24000)
    assert [line for update in updates for line in count_update(counter, update)] == []
    batches = [batch for update in updates for batch in update.micro_batches]
    assert sum(counter.hours.values()) * 3600 == pytest.approx(sum(int(b.audio_lengths.sum()) for b in batches) / 24000)
    assert set(counter.hours) == {domain for batch in batches for domain in batch.domains}
    other = StreamCounter(24000)
    other.load_state_dict(counter.state_dict())
    count_update(other, updates[0])
    assert other.hours["speech"] > counter.hours["speech"]


def test_a_share_above_the_ceiling_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "MIN_SAMPLES", 100)
    bad = UpdateBatch((), 0, 0, (InvalidSample("clip-7", "damaged JSON (x)", Fault.JSON),))
    counter = StreamCounter(24000, max_invalid_fraction=0.02)
    count_update(counter, bad)
    count_update(counter, bad)
    with pytest.raises(
        UserError, match=r"3 of 3 samples could not be used \(3 JSON\), more than max_invalid_fraction=0\.02"
    ):
        count_update(counter, bad)


def test_data_out_of_reach_late_in_a_run_stops_it_within_twenty_updates() -> None:
    """A limit on the share of all samples alone would let the run continue for a thousand updates."""
    counter = StreamCounter(24000, max_invalid_fraction=0.01)
    counter.load_state_dict({"samples": {"speech": 10**9}, "kinds": {}, "num_clips": 10**6})
    good, gone = ({"used_clips": used, "bad/file": bad} for used, bad in ((10.0, 0.0), (0.0, 10.0)))
    for _ in range(counting.RECENT_UPDATES):
        counter.add_counts(good)
    for _ in range(counting.RECENT_UPDATES // 2):
        counter.add_counts(gone)
    with pytest.raises(UserError, match=r"110 of the 200 samples of the last 20 updates .* is the data still in reach"):
        counter.add_counts(gone)
    assert counter.invalid == {"file": 110}
