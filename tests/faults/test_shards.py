"""Shards that are cut, altered, exchanged or foreign: detected and named, with no clip silently lost or repeated."""

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from moss_train.batch import UpdateBatch
from moss_train.commands import pack as pack_command
from moss_train.data.shards.format import read_shard
from moss_train.data.shards.index import ClipLocation, ShardIndex
from moss_train.data.stream.loader import make_loader
from moss_train.data.stream.sample_reader import ClipReader, SampleError
from moss_train.data.stream.stream import AudioStream, ClipFormat
from moss_train.utils.errors import UserError
from moss_train.utils.files import sha256_of

from .harness import SCALE

pytestmark = pytest.mark.faults

SHORT = ("perc_snap.flac", "elec_flip.flac", "bd_808.flac", "elec_blip.flac", "tabla_ke1.flac", "elec_pop.flac")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, recordings: Path, pack_config: Callable) -> Path:
    """Two shards of three short clips each; every second clip has a text."""
    folder = tmp_path_factory.mktemp("small")
    entries = [
        {"path": str(recordings / "sound" / name), "id": name, "domain": "sound", "text": "a sound" if i % 2 else None}
        for i, name in enumerate(SHORT)
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    config = pack_config(
        input=folder / "manifest.jsonl", out=folder / "packed", shard_bytes=20_000, min_seconds=0.0, num_workers=1
    )
    assert pack_command.run(config) == 0
    return folder / "packed"


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


def open_stream(folder: Path) -> AudioStream:
    return AudioStream([folder], ClipFormat(24000, 1, 1920), crop_seconds=60.0, max_seconds=60.0)


def one_pass(stream: AudioStream) -> UpdateBatch:
    """Return an update with every clip once, whole, from the training loader."""
    seconds = sum(stream.available_seconds.values())
    loader = make_loader(
        stream,
        text_encoder=lambda text: list(text.encode()),
        position=0,
        updates=[(0, seconds)],
        micro_batch_seconds=60.0,
    )
    (update,) = loader
    return update


def contents(update: UpdateBatch) -> dict[str, tuple[torch.Tensor, str]]:
    """Return audio and text of every clip by id; a repeated id is an error."""
    found: dict[str, tuple[torch.Tensor, str]] = {}
    for batch in update.micro_batches:
        for i, name in enumerate(batch.sample_ids):
            assert name not in found
            text = bytes(batch.text_tokens[i, : batch.text_lengths[i]].tolist()).decode("utf-8", "replace")
            found[name] = (batch.audio[i, :, : int(batch.audio_lengths[i])], text)
    return found


def places(size: int, step: int) -> Iterator[int]:
    """Yield offsets of each block's first and last byte and between: headers, bodies, padding, end of the tar."""
    for block in range(0, size, 512):
        yield from range(block, min(block + 512, size), step)
        yield min(block + 511, size - 1)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 0x10]), offset)


def test_a_shard_cut_anywhere_is_found_when_it_is_opened(copy: Path) -> None:
    shard = copy / ShardIndex.load(copy).shards[0].file
    content = shard.read_bytes()
    count = 0
    for length in places(len(content), max(1, 128 // SCALE)):
        shard.write_bytes(content[:length])
        with pytest.raises(UserError, match=rf"{shard.name} has {length} bytes, its index says {len(content)}"):
            ShardIndex.load(copy)
        count += 1
    assert count > 200


def test_a_shard_cut_anywhere_during_training_loses_what_is_gone_by_name(copy: Path, small: Path) -> None:
    intact = contents(one_pass(open_stream(small)))
    shard = copy / ShardIndex.load(copy).shards[0].file
    content = shard.read_bytes()
    for length in places(len(content), 512):
        shard.write_bytes(content)
        stream = open_stream(copy)
        os.truncate(shard, length)
        check_against(intact, one_pass(stream))


def check_against(intact: dict[str, tuple[torch.Tensor, str]], update: UpdateBatch) -> int:
    """Check that clips that were read are unchanged and all others are named. Returns how many are missing."""
    found = contents(update)
    assert len(found) + len(update.dropped) == len(intact)
    assert len({name for name, *_ in update.dropped} | found.keys()) == len(intact)
    for name, (audio, text) in found.items():
        assert torch.equal(audio, intact[name][0]), name
        assert text == intact[name][1]
    return len(update.dropped)


def test_a_byte_altered_anywhere_is_found_by_hash_and_never_becomes_audio_or_text(copy: Path, small: Path) -> None:
    """`inspect` finds every altered byte; training finds all that would change audio, text or an id."""
    intact = contents(one_pass(open_stream(small)))
    index = ShardIndex.load(copy)
    shard = copy / index.shards[0].file
    stream, lost, count = open_stream(copy), 0, 0
    for offset in places(shard.stat().st_size, max(1, 256 // SCALE)):
        flip(shard, offset)
        with pytest.raises(UserError, match=f"{shard.name} is damaged: its hash differs"):
            index.verify_shard(index.shards[0])
        lost += check_against(intact, one_pass(stream))
        flip(shard, offset)
        count += 1
    assert count > 100
    assert lost > count / 2
    check_against(intact, one_pass(stream))


REPLACEMENTS = {
    "nothing": lambda content: b"",
    "garbage": lambda content: b"\xa5" * len(content),
    "zeros": lambda content: bytes(len(content)),
    "a web page": lambda content: b"<html><body>404</body></html>".ljust(len(content)),
    "too long": lambda content: content + b"\0" * 512,
}


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_something_else_in_the_place_of_a_shard(copy: Path, small: Path, kind: str) -> None:
    intact = contents(one_pass(open_stream(small)))
    index = ShardIndex.load(copy)
    shard = copy / index.shards[0].file
    stream = open_stream(copy)
    shard.write_bytes(REPLACEMENTS[kind](shard.read_bytes()))
    with pytest.raises(UserError, match=shard.name):
        ShardIndex.load(copy).verify()
    lost = check_against(intact, one_pass(stream))
    assert lost == index.shards[0].num_clips


def test_shards_that_change_places_between_two_passes(copy: Path, small: Path) -> None:
    """Each clip is checked against its tar header, so that it cannot be confused with another one."""
    intact = contents(one_pass(open_stream(small)))
    stream = open_stream(copy)
    check_against(intact, one_pass(stream))
    one, two = (copy / shard.file for shard in ShardIndex.load(copy).shards)
    one.rename(copy / "third"), two.rename(one), (copy / "third").rename(two)
    assert check_against(intact, one_pass(open_stream_or(stream, copy))) == len(intact)
    with pytest.raises(UserError, match="bytes, its index says"):
        ShardIndex.load(copy)


def open_stream_or(stream: AudioStream, folder: Path) -> AudioStream:
    """Return the stream that was opened before; a newly opened one would be refused."""
    with pytest.raises(UserError, match="bytes, its index says"):
        open_stream(folder)
    return stream


def test_a_shard_or_folder_that_is_listed_twice_is_noticed(copy: Path) -> None:
    with pytest.warns(UserWarning, match=r"copy is given 2 times, its clips are used 2 times as often"):
        AudioStream([copy, copy.parent / "." / copy.name], ClipFormat(24000, 1, 1920), crop_seconds=1.0)
    index = json.loads((copy / "index.json").read_text())
    arrays = load_file(copy / "index.safetensors")
    first = index["shards"][0]["num_samples"]
    doubled = {name: torch.cat([array[:first], array]) for name, array in arrays.items()}
    (copy / "index.safetensors").write_bytes(save(doubled))
    index["shards"] = [index["shards"][0], *index["shards"]]
    index["num_samples"] += first
    index["arrays_sha256"] = sha256_of(copy / "index.safetensors")
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"sound-000000\.tar.*twice|twice.*sound-000000\.tar"):
        open_stream(copy)


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, len(content), link
    tar.addfile(member, io.BytesIO(content))


LABELS = json.dumps({"id": "x", "num_samples": 100, "sampling_rate": 24000}).encode()
STRANGE: dict[str, list[tuple]] = {
    "audio missing": [("a.json", LABELS)],
    "labels missing": [("a.flac", b"f")],
    "labels of another clip": [("a.flac", b"f"), ("b.json", LABELS)],
    "audio twice": [("a.flac", b"f"), ("a.flac", b"f"), ("a.json", LABELS)],
    "not adjacent": [("a.flac", b"f"), ("b.flac", b"f"), ("a.json", LABELS), ("b.json", LABELS)],
    "other order": [("a.json", LABELS), ("a.flac", b"f")],
    "symbolic link": [("a.flac", b"f"), ("a.json", b"", tarfile.SYMTYPE, "/etc/passwd")],
    "hard link": [("a.flac", b"f"), ("a.json", b"", tarfile.LNKTYPE, "a.flac")],
    "device": [("a.flac", b"", tarfile.CHRTYPE), ("a.json", LABELS)],
    "pipe": [("a.flac", b"", tarfile.FIFOTYPE), ("a.json", LABELS)],
    "folder": [("a.flac", b"", tarfile.DIRTYPE), ("a.json", LABELS)],
    "pickle": [("a.pkl", pickle.dumps(print)), ("a.json", LABELS)],
    "other rate": [("a.flac", b"f"), ("a.json", LABELS.replace(b"24000", b"44100"))],
    "no rate": [("a.flac", b"f"), ("a.json", b"{}")],
    "a list": [("a.flac", b"f"), ("a.json", b"[]")],
    "not JSON": [("a.flac", b"f"), ("a.json", b"{")],
    "not UTF-8": [("a.flac", b"f"), ("a.json", b'"\xff"')],
    "deep JSON": [("a.flac", b"f"), ("a.json", b"[" * 100_000)],
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_tar_that_is_no_shard_is_not_indexed(tmp_path: Path, kind: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for member in STRANGE[kind]:
            add(tar, *member)
    with pytest.raises(UserError, match=r"x\.tar"):
        read_shard(tmp_path / "x.tar", 24000)


@pytest.mark.parametrize("damage", ["cut in a header", "cut in a body", "not a tar", "huge size"])
def test_a_damaged_tar_is_not_indexed(tmp_path: Path, small: Path, damage: str) -> None:
    path = tmp_path / "x.tar"
    content = next(small.glob("*.tar")).read_bytes()
    if damage == "huge size":
        with tarfile.open(path, "w") as tar:
            add(tar, "a.flac", b"f")
        content = bytearray(path.read_bytes())
        header = tarfile.TarInfo("a.flac")
        header.size = 8 * 2**30
        content[:512] = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(
        {"cut in a header": content[:100], "cut in a body": content[:700], "not a tar": b"x" * 5000}.get(
            damage, content
        )
    )
    with pytest.raises(UserError, match=r"x\.tar"):
        read_shard(path, 24000)


@pytest.fixture
def location(small: Path) -> ClipLocation:
    return ShardIndex.load(small).locate(1)


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "device", "pipe", "folder"])
def test_members_that_are_no_files_are_not_read(tmp_path: Path, small: Path, location: ClipLocation, kind: str) -> None:
    """A foreign shard with a matching index."""
    path = tmp_path / "x.tar"
    content = bytearray(Path(location.shard).read_bytes())
    header = tarfile.TarInfo("/dev/sda.flac")
    header.type, header.linkname, header.size = (
        STRANGE[kind][-1 if "link" in kind else 0][2],
        "/etc/passwd",
        location.audio_size,
    )
    content[location.audio_offset - 512 : location.audio_offset] = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(content)
    with pytest.raises(SampleError, match="is not a file of the tar"):
        ClipReader(24000, 1).check_headers(replace(location, shard=str(path)))


@pytest.mark.parametrize(
    "name", ["../../etc/evil.flac", "/etc/evil.flac", "a" * 95 + ".flac", "\udcff\udcfe.flac", "a\nb.flac", ".flac"]
)
def test_a_strange_member_name_is_never_a_path(tmp_path: Path, location: ClipLocation, name: str) -> None:
    path = tmp_path / "x.tar"
    content = bytearray(Path(location.shard).read_bytes())
    header = tarfile.TarInfo(name)
    header.size = location.audio_size
    content[location.audio_offset - 512 : location.audio_offset] = header.tobuf(
        tarfile.GNU_FORMAT, "utf-8", "surrogateescape"
    )[-512:]
    path.write_bytes(content)
    reader, wrong = ClipReader(24000, 1), replace(location, shard=str(path))
    reader.check_headers(wrong)
    assert torch.equal(
        reader.read_audio(wrong, 0, location.num_samples),
        ClipReader(24000, 1).read_audio(location, 0, location.num_samples),
    )


@pytest.mark.parametrize(
    "change",
    [
        {"audio_size": 8 * 2**30},
        {"audio_size": 2**62},
        {"audio_offset": -5},
        {"audio_offset": 2**62},
        {"json_size": 8 * 2**30},
        {"json_offset": -1},
        {"json_size": -1},
        {"audio_size": -1},
        {"num_samples": 2**62},
        {"shard": "pipe:touch canary"},
        {"shard": "/dev/zero"},
    ],
)
def test_an_index_that_lies_is_a_bad_sample_and_takes_no_memory(
    location: ClipLocation, change: dict, tmp_path: Path
) -> None:
    wrong, reader = replace(location, **change), ClipReader(24000, 1)
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        with pytest.raises(SampleError):
            reader.check_headers(wrong), reader.read_labels(wrong), reader.read_audio(wrong, 0, wrong.num_samples)
        assert list(tmp_path.iterdir()) == []
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    "source", ["pipe:touch canary", "pipe:cat shards/index.json", "/dev/zero", "http:///", "a\0b", ""]
)
def test_a_source_is_a_folder_or_a_url_and_never_a_command(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSS_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("moss_train.data.shards.remote.FIRST_WAIT_SECONDS", 0.01)
    with pytest.raises(UserError):
        ShardIndex.load(source)
    assert not (tmp_path / "canary").exists()


def test_arrays_of_wrong_types_shapes_and_values_are_refused(copy: Path) -> None:
    arrays = load_file(copy / "index.safetensors")
    wrong = [{name: array.double()} for name, array in arrays.items()]
    wrong += [{name: array[:, None].contiguous()} for name, array in arrays.items()]
    wrong += [{name: array[:-1].contiguous()} for name, array in arrays.items()]
    wrong += [{"num_samples": torch.zeros_like(arrays["num_samples"])}]
    for change in wrong:
        (copy / "index.safetensors").write_bytes(save({**arrays, **change}))
        with pytest.raises(UserError, match=r"the index of .* is damaged"):
            open_stream(copy)
