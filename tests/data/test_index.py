"""The index detects every kind of damage that a tar reader would ignore, and never refers outside its folder."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moss_train.data.shards.index import ShardIndex
from moss_train.data.stream.sample_reader import ClipReader, SampleError
from moss_train.utils.errors import UserError


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def edit_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | changes))


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x40
    path.write_bytes(content)


def test_an_intact_copy_passes(copy: Path) -> None:
    index = ShardIndex.load(copy)
    index.verify()
    assert len(index) == sum(shard.num_clips for shard in index.shards) > 0


def test_a_shard_that_was_cut_or_is_gone_is_found_at_once(copy: Path) -> None:
    shard = copy / ShardIndex.load(copy).shards[1].file
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match=rf"{shard.name} has \d+ bytes, its index says \d+"):
        ShardIndex.load(copy)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} is in the index but cannot be read: No such file"):
        ShardIndex.load(copy)


def test_of_many_shards_some_are_looked_at_and_the_others_when_they_are_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moss_train.data.shards.index.CHECKED_AT_LOAD", 2)
    shard = copy / ShardIndex.load(copy).shards[1].file
    shard.write_bytes(shard.read_bytes()[:-512])
    index = ShardIndex.load(copy)
    with pytest.raises(SampleError, match=rf"{shard.name} has \d+ bytes, the index says \d+"):
        ClipReader(24000, 1).check_headers(index.locate(index.shards.rows_of(1)[0]))
    first = copy / index.shards[0].file
    first.unlink()
    with pytest.raises(UserError, match=rf"{first.name} is in the index but cannot be read"):
        ShardIndex.load(copy)


def test_the_table_of_shards_gives_back_its_records(copy: Path) -> None:
    records = json.loads((copy / "index.json").read_text())["shards"]
    shards = ShardIndex.load(copy).shards
    assert [shard.to_json() for shard in shards] == records
    assert [row for number in range(len(shards)) for row in shards.rows_of(number)] == list(
        range(sum(record["num_samples"] for record in records))
    )
    assert all(shards.shard_of(row) == number for number in range(len(shards)) for row in shards.rows_of(number))
    for domain in ("music", "sound", "speech"):
        rows = [row for begin, end in shards.runs_of(domain) for row in range(begin, end)]
        assert rows == [row for n, shard in enumerate(shards) if shard.domain == domain for row in shards.rows_of(n)]
    assert list(shards.runs_of("noise")) == []


@pytest.mark.parametrize("place", ["header", "data"])
def test_full_verification_finds_one_flipped_bit(copy: Path, place: str) -> None:
    index = ShardIndex.load(copy)
    location = index.locate(3)
    flip_byte(Path(location.shard), location.audio_offset + (-512 if place == "header" else 1000))
    with pytest.raises(UserError, match=r"\.tar is damaged: its hash differs"):
        ShardIndex.load(copy).verify()


def test_damaged_arrays_are_found(copy: Path) -> None:
    arrays = copy / "index.safetensors"
    flip_byte(arrays, arrays.stat().st_size - 1)
    with pytest.raises(UserError, match=r"does not fit|hash differs"):
        ShardIndex.load(copy).verify()
    arrays.write_bytes(arrays.read_bytes()[:100])
    with pytest.raises(UserError, match=r"the index of .* is damaged"):
        ShardIndex.load(copy)
    arrays.unlink()
    with pytest.raises(UserError, match=r"the index of .* is damaged"):
        ShardIndex.load(copy)


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd", "sub/x.tar", ".."])
def test_shard_names_cannot_leave_the_folder(copy: Path, name: str) -> None:
    shards = json.loads((copy / "index.json").read_text())["shards"]
    shards[0]["file"] = name
    edit_index(copy, shards=shards)
    with pytest.raises(UserError, match="is not the plain name"):
        ShardIndex.load(copy)


def test_other_folders_and_formats_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder of packed shards"):
        ShardIndex.load(tmp_path)
    edit_index(copy, version=99)
    with pytest.raises(UserError, match="format version 99, this version reads 1"):
        ShardIndex.load(copy)
    (copy / "index.json").write_text("{}")
    with pytest.raises(UserError, match="not an index of moss_train shards"):
        ShardIndex.load(copy)
    (copy / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        ShardIndex.load(copy)


def test_an_altered_letter_of_a_text_is_found_when_it_is_read(copy: Path) -> None:
    """Folders that were packed before checksums existed are read without checking."""
    index = ShardIndex.load(copy)
    location = next(index.locate(row) for row in range(len(index)) if index.arrays["has_text"][row])
    labels = ClipReader(24000, 1).read_labels(location)
    place = location.json_offset + Path(location.shard).read_bytes()[location.json_offset :].index(b'"text": "') + 10
    flip_byte(Path(location.shard), place)
    with pytest.raises(SampleError, match="JSON was altered: its checksum differs from the index"):
        ClipReader(24000, 1).read_labels(location)
    arrays = load_file(copy / "index.safetensors")
    save_file({name: arrays[name] for name in arrays if name != "json_crc32"}, copy / "index.safetensors")
    earlier = next(place for place in map(ShardIndex.load(copy).locate, range(len(index))) if place.has_text)
    assert earlier.json_crc32 is None
    altered = ClipReader(24000, 1).read_labels(earlier)
    assert altered["text"] != labels["text"]
    assert altered | {"text": labels["text"]} == labels
