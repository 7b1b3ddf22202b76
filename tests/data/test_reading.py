"""Reading single samples: crops by seeking, and labels that contradict the index."""

import json
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moss_train.data.shards.index import ClipLocation, ShardIndex
from moss_train.data.shards.reader import ShardFiles
from moss_train.data.stream.sample_reader import ClipReader, SampleError, scale_to_peak
from tests.data.packed_clips import iterate_clips


@pytest.fixture
def location(packed: Path) -> ClipLocation:
    index = ShardIndex.load(packed)
    return next(index.locate(row) for row in range(len(index)) if index.arrays["num_samples"][row] > 50_000)


def test_a_crop_equals_the_part_of_the_whole_clip(location: ClipLocation) -> None:
    reader = ClipReader(24000, 1)
    whole = reader.read_audio(location, 0, location.num_samples)
    for start, count in ((0, 100), (12345, 20_000), (location.num_samples - 7, 7)):
        assert torch.equal(reader.read_audio(location, start, count), whole[:, start : start + count])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 60_001}, r"asked for|the index says \(24000, 1, 60001\)"),
        ({"audio_size": 3000}, "not audio|damaged"),
        ({"audio_offset": 0}, "not audio"),
        ({"shard_bytes": 77}, r"\.tar has \d+ bytes, the index says 77"),
        ({"shard": "/nowhere/x.tar"}, "cannot read /nowhere/x.tar: No such file"),
    ],
)
def test_audio_that_does_not_fit_the_index_is_an_error(location: ClipLocation, change: dict, message: str) -> None:
    wrong = replace(location, **change)
    with pytest.raises(SampleError, match=message):
        ClipReader(24000, 1).read_audio(wrong, 0, wrong.num_samples)


def test_another_format_than_expected_is_an_error(location: ClipLocation) -> None:
    with pytest.raises(SampleError, match=r"are \(24000, 1, 100\), the index says \(48000, 1, 100\)"):
        ClipReader(48000, 1).read_audio(location, 0, 100)


def location_of(path: Path) -> ClipLocation:
    """Return a clip's JSON that refers to a whole file."""
    size = path.stat().st_size
    return ClipLocation(str(path), 0, 0, 0, size, num_samples=100, has_text=True, shard_bytes=size, shard_sha256="")


GOOD_LABELS = {"id": "x", "num_samples": 100, "sampling_rate": 24000, "text": "hello", "task": "asr"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "damaged JSON"),
        (b"\xff\xfe", "damaged JSON"),
        (b"[" * 100_000, "damaged JSON"),
        (b"[]", "without an id"),
        (json.dumps(GOOD_LABELS | {"num_samples": 99}).encode(), "the index says"),
        (json.dumps({k: v for k, v in GOOD_LABELS.items() if k != "text"}).encode(), "the index says"),
        (json.dumps(GOOD_LABELS | {"task": "tts"}).encode(), "text without a known task: 'tts'"),
        (b" " * (2**20 + 1), "JSON has 1048577 bytes"),
    ],
)
def test_labels_that_do_not_fit_are_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "shard"
    path.write_bytes(content)
    location = location_of(path)
    with pytest.raises(SampleError, match=message):
        ClipReader(24000, 1).read_labels(location)
    path.write_text(json.dumps(GOOD_LABELS))
    location = location_of(path)
    assert ClipReader(24000, 1).read_labels(location) == GOOD_LABELS


def test_only_a_few_files_stay_open(tmp_path: Path) -> None:
    files = ShardFiles(capacity=2)
    for name in "abca":
        (tmp_path / name).write_text(name)
        assert files.open(location_of(tmp_path / name)).read(9, 0) == name.encode()
    assert sum(times_open(tmp_path / name) for name in "abc") == 2
    assert pickle.loads(pickle.dumps(files)).open(location_of(tmp_path / "a")).read(9, 0) == b"a"
    files.close()
    assert sum(times_open(tmp_path / name) for name in "abc") == 0


def test_a_shard_that_is_being_read_stays_open(tmp_path: Path) -> None:
    """Its descriptor would belong to one of the others, whose bytes would be taken for its own."""
    for name in "abc":
        (tmp_path / name).write_text(name * 3)
    files = ShardFiles(capacity=1)
    read = [files.open(location_of(tmp_path / name)) for name in "abc"]
    assert [shard.read(9, 0) for shard in read] == [b"aaa", b"bbb", b"ccc"]
    del read
    assert [times_open(tmp_path / name) for name in "abc"] == [0, 0, 1]


def test_many_threads_read_the_right_shards(tmp_path: Path) -> None:
    locations = []
    for number in range(12):
        (tmp_path / f"{number}").write_text(f"{number}" * 5)
        locations.append(location_of(tmp_path / f"{number}"))
    files = ShardFiles(capacity=2)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: files.read(locations[number % 12], 0, 99), range(2000)))
    assert found == [f"{number % 12}".encode() * 5 for number in range(2000)]


def times_open(path: Path) -> int:
    targets = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    return targets.count(os.path.realpath(path))


def test_threads_that_share_a_reader_open_a_shard_once(
    location: ClipLocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`encode shards=` uses several threads. On a network file system each opened the shard, and one was closed."""
    shard = tmp_path / "one.tar"  # a separate shard: readers of other tests may still have the shared one open
    shutil.copyfile(location.shard, shard)
    location = replace(location, shard=str(shard))
    opened, begin = os.open, threading.Barrier(4)

    def open_slowly(*args: Any, **options: Any) -> int:
        begin.wait(10)
        return opened(*args, **options)

    monkeypatch.setattr(os, "open", open_slowly)
    files = ShardFiles()
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: files.read(location, location.json_offset, location.json_size), range(4)))
    assert len(found) == 1
    assert times_open(shard) == 1


def test_evaluation_reads_every_clip_in_the_order_of_the_index(packed: Path) -> None:
    index = ShardIndex.load(packed)
    clips = list(iterate_clips([packed], sampling_rate=24000, num_channels=1, peak=0.5))
    assert [audio.shape[1] for _, audio, _ in clips] == index.arrays["num_samples"].tolist()
    assert all(audio.abs().max().item() == pytest.approx(0.5) or not audio.any() for _, audio, _ in clips)


def test_scaling_keeps_silence_and_shape() -> None:
    assert scale_to_peak(torch.tensor([[0.1, -0.2]]), 0.5)[0].tolist() == pytest.approx([0.25, -0.5])
    assert scale_to_peak(torch.zeros(1, 4), 0.5).tolist() == [[0.0] * 4]
    assert scale_to_peak(torch.zeros(1, 0), 0.5).shape == (1, 0)
    assert scale_to_peak(torch.tensor([[0.1]]), None).item() == pytest.approx(0.1)
