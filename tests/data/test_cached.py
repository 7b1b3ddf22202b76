import os
import shutil
from pathlib import Path

import pytest

from moss_train.audio.io import read_audio, write_audio
from moss_train.config.schema import PackConfig
from moss_train.data.pack.manifest import list_clips
from moss_train.data.pack.on_the_fly import pack_cached, split
from moss_train.data.shards.index import ShardIndex
from moss_train.utils.errors import UserError


@pytest.fixture
def folder(recordings, tmp_path) -> Path:
    """Eight real recordings, in two folders."""
    files = sorted((recordings / "sound").glob("bd_*.flac"))[:8]
    for number, file in enumerate(files):
        target = tmp_path / "audio" / ("a" if number % 2 else "b") / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return tmp_path / "audio"


def prepare(folder: Path, cache: Path, **options):
    return pack_cached(PackConfig(folder, cache, "sound", **options), heldout_fraction=0.02)


def test_a_folder_is_packed_once_with_one_clip_held_out(folder, tmp_path, capsys):
    packed = prepare(folder, tmp_path / "cache")
    assert (len(ShardIndex.load(packed.train)), len(ShardIndex.load(packed.heldout))) == (7, 1)
    assert "7 files to learn from, 1 held out, packed into" in capsys.readouterr().err
    times = {path: path.stat().st_mtime_ns for path in packed.train.iterdir()}
    assert prepare(folder, tmp_path / "cache") == packed
    assert "found packed in" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in packed.train.iterdir()} == times


def test_other_files_or_another_format_are_other_shards(folder, tmp_path):
    keys = {prepare(folder, tmp_path / "cache").key, prepare(folder, tmp_path / "cache", sampling_rate=16000).key}
    file = next(folder.rglob("*.flac"))
    os.utime(file, ns=(1, 1))
    keys.add(prepare(folder, tmp_path / "cache").key)
    file.rename(file.with_name("renamed.flac"))
    keys.add(prepare(folder, tmp_path / "cache").key)
    assert len(keys) == 4
    shutil.copytree(folder, moved := tmp_path / "moved", copy_function=shutil.copy2)
    assert prepare(moved, tmp_path / "cache").key in keys  # names below the folder count, not the folder's location


def test_what_is_held_out_depends_on_the_names_alone(recordings):
    sources = list_clips(recordings / "sound", "sound")
    heldout, train = split(sources, 0.1)
    assert len(heldout.clips) == -(-len(sources.clips) // 10)
    assert {clip.id for clip in heldout.clips} | {clip.id for clip in train.clips} == {c.id for c in sources.clips}
    again, _ = split(type(sources)(sources.source, sources.clips[::-1]), 0.1)
    assert {clip.id for clip in again.clips} == {clip.id for clip in heldout.clips}
    alone, rest = split(type(sources)(sources.source, sources.clips[:1]), 0.5)
    assert (len(alone.clips), len(rest.clips)) == (0, 1)


def test_one_damaged_file_is_named_and_nothing_is_left(folder, tmp_path):
    file = sorted(folder.rglob("*.flac"))[0]
    file.write_bytes(b"not audio")
    with pytest.raises(UserError, match=file.name):
        prepare(folder, tmp_path / "cache", max_invalid_fraction=0.01)
    assert list((tmp_path / "cache").rglob("*.tar")) == []
    packed = prepare(folder, tmp_path / "cache", max_invalid_fraction=0.5)
    assert len(ShardIndex.load(packed.train)) + len(ShardIndex.load(packed.heldout)) == 7


def test_held_out_clips_that_are_too_short_leave_the_others_to_learn_from(folder, tmp_path, capsys):
    heldout, _ = split(list_clips(folder, "sound"), 0.02)
    (path,) = (clip.path for clip in heldout.clips)
    audio, rate = read_audio(path)
    write_audio(path, audio[:, : rate // 50], rate)
    for _ in range(2):
        packed = prepare(folder, tmp_path / "cache")
        assert (len(ShardIndex.load(packed.train)), packed.heldout) == (7, None)
        printed = capsys.readouterr().err
        assert "nothing is held out: " in printed
        assert "7 files to learn from, 0 held out" in printed


def test_the_limit_for_unusable_files_is_a_fraction_of_all_files(folder, tmp_path):
    heldout, _ = split(list_clips(folder, "sound"), 0.25)
    heldout.clips[0].path.write_bytes(b"not audio")
    options = PackConfig(folder, tmp_path / "cache", "sound", max_invalid_fraction=0.125)
    packed = pack_cached(options, heldout_fraction=0.25)
    assert (len(ShardIndex.load(packed.train)), len(ShardIndex.load(packed.heldout))) == (6, 1)
    heldout.clips[0].path.unlink()
    (folder / "gone.flac").symlink_to(folder / "nowhere.flac")
    packed = pack_cached(options, heldout_fraction=0.25)  # the link is one of eight, and not of the two held out
    assert (len(ShardIndex.load(packed.train)), len(ShardIndex.load(packed.heldout))) == (5, 2)
