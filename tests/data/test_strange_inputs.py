"""Unusual files in folders and manifests: each is read, or it is named and counted while the rest is read."""

import gzip
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moss_train.audio.window import Remark
from moss_train.config.schema import PackConfig
from moss_train.data.clips import list_sources
from moss_train.data.pack.manifest import list_clips
from moss_train.data.pack.on_the_fly import pack_cached
from moss_train.data.pack.pack import pack
from moss_train.data.pack.preprocess import SILENT, SkippedClip, preprocess_clip
from moss_train.data.shards.format import EncodedClip
from moss_train.data.shards.index import ShardIndex
from moss_train.inference.files import find_audio, find_codes, targets_of
from moss_train.training.run.fit import warn_of_silence
from moss_train.utils.errors import Fault, UserError
from moss_train.utils.files import MAX_NAME_BYTES, atomic_write
from tests.data.packed_clips import iterate_clips
from tests.model.small_models import save_one_stage_model

RATE = 24000
TONE = (np.sin(np.arange(RATE) * 0.05) * 0.4).astype(np.float32)


def wav(path: Path, samples: np.ndarray = TONE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    soundfile.write(content, samples, RATE, format="WAV")
    path.write_bytes(content.getvalue())
    return path


def manifest(folder: Path, *entries: dict, name: str = "clips.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


@pytest.fixture
def special(tmp_path: Path) -> Path:
    folder = tmp_path / "audio"
    wav(folder / "good.wav")
    (folder / "dangling.wav").symlink_to(folder / "nowhere.wav")
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    (folder / "device.wav").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.wav")
    with socket.socket(socket.AF_UNIX) as listener:
        place = os.getcwd()
        os.chdir(folder)  # the path of a socket may have at most 107 bytes
        listener.bind("socket.wav")
        os.chdir(place)
    return folder


def test_what_is_no_ordinary_file_is_named_counted_and_never_opened(special: Path, tmp_path: Path) -> None:
    found = list_clips(special, "audio")
    assert [clip.id for clip in found.clips] == ["good.wav"]
    assert [bad.name for bad in found.invalid] == ["dangling.wav", "device.wav", "loop.wav", "pipe.wav", "socket.wav"]
    assert {bad.fault for bad in found.invalid} == {Fault.SPECIAL_FILE}
    report = pack(found, PackConfig("in", tmp_path / "out", max_invalid_fraction=1.0, num_workers=1))
    assert (report.index["num_samples"], len(report.invalid)) == (1, 5)
    works, failures = find_audio([str(special)], tmp_path / "codes")
    assert (len(works), len(failures)) == (1, 5)
    read = [clip for clip in list_sources([str(special)], "audio") if clip.id == "pipe.wav"]
    with pytest.raises(UserError, match="a named pipe"):
        read[0].read()
    with pytest.raises(UserError, match=r"pipe\.wav is a named pipe"):
        list_clips(manifest(special, {"path": "pipe.wav"}), "audio")


def test_a_single_file_stands_for_a_folder(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.wav")
    assert [clip.id for clip in list_clips(path, "speech").clips] == ["a.wav"]
    (clip,) = list_sources([str(path)], "speech")
    assert clip.read()[0].shape == (1, RATE)


@pytest.mark.parametrize("key", ["input", "data.path", "data"])
def test_messages_name_the_key_that_was_typed(tmp_path: Path, key: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").touch()
    for name in ("empty", "x.txt", "missing"):
        with pytest.raises(UserError, match=rf"^{key}=.*{name}"):
            list_clips(tmp_path / name, "audio", key)


def test_formats_of_phones_come_with_the_command_that_converts_them(tmp_path: Path) -> None:
    folder = tmp_path / "phone"
    folder.mkdir()
    (folder / "memo.m4a").write_bytes(b"\0\0\0\x18ftypM4A ")
    with pytest.raises(UserError, match=r"1 \.m4a.*ffmpeg -i clip\.m4a clip\.flac"):
        list_clips(folder, "audio")
    with pytest.raises(UserError, match=r"ffmpeg -i clip\.m4a"):
        list_clips(folder / "memo.m4a", "audio")
    wav(folder / "good.wav")
    assert list_clips(folder, "audio").ignored == {".m4a": 1}
    outcome = preprocess_clip(
        list_clips(manifest(folder, {"path": "memo.m4a"}), "audio").clips[0], PackConfig("in", "out")
    )
    assert isinstance(outcome, SkippedClip)
    assert "ffmpeg -i" in outcome.reason


@pytest.mark.parametrize(("end", "remarks"), [(1.0, ()), (1.009, (Remark.CLAMPED,)), (-1, ()), (None, ())])
def test_a_part_may_end_a_rounding_error_behind_its_recording(tmp_path: Path, end: float | None, remarks) -> None:
    wav(tmp_path / "a.wav")
    source = manifest(tmp_path, {"path": "a.wav", "start_seconds": 0.25, "end_seconds": end})
    outcome = preprocess_clip(list_clips(source, "speech").clips[0], PackConfig("in", "out"))
    assert isinstance(outcome, EncodedClip)
    assert (outcome.num_samples, outcome.remarks) == (18000, remarks)


def test_a_part_that_ends_far_behind_its_recording_is_refused(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav")
    source = manifest(tmp_path, {"path": "a.wav", "end_seconds": 1.02})
    outcome = preprocess_clip(list_clips(source, "speech").clips[0], PackConfig("in", "out"))
    assert isinstance(outcome, SkippedClip)
    assert outcome.fault == Fault.LENGTH


def test_segments_of_kaldi_may_end_at_minus_one(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav")
    (tmp_path / "wav.scp").write_text("rec a.wav\n")
    (tmp_path / "segments").write_text("one rec 0.5 -1\ntwo rec 0.5 1.004\n")
    outcomes = [preprocess_clip(clip, PackConfig("in", "out")) for clip in list_clips(tmp_path, "speech").clips]
    assert [outcome.num_samples for outcome in outcomes if isinstance(outcome, EncodedClip)] == [12000, 12000]


def test_nemo_manifests_mean_what_they_mean_there(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav")
    entry = {"audio_filepath": "a.wav", "offset": 0.25, "duration": 0.5, "text": "ab"}
    found = list_clips(manifest(tmp_path, entry, name="train.json"), "speech")
    (clip,) = found.clips
    assert (clip.start_seconds, clip.end_seconds, clip.text, found.ignored) == (0.25, 0.75, "ab", {})
    (listed,) = list_sources([str(tmp_path / "train.json")], "speech")
    assert listed.read()[0].shape == (1, 12000)  # only this part, because the text belongs to it


def test_parts_of_one_file_need_no_ids_of_their_own(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav")
    parts = [{"audio_filepath": "a.wav", "offset": start, "duration": 0.25} for start in (0, 0.25, 0.5, 0.5)]
    found = list_clips(manifest(tmp_path, *parts, name="train.json"), "speech")
    assert [clip.id for clip in found.clips] == ["a.wav", "a.wav@0.250", "a.wav@0.500"]
    assert [bad.fault for bad in found.invalid] == [Fault.REPEATED_ID]


def test_a_column_called_row_is_no_row_of_a_saved_dataset(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav")
    (tmp_path / "clips.csv").write_text("row,path\n7,a.wav\n")
    (clip,) = list_clips(tmp_path / "clips.csv", "speech").clips
    assert isinstance(preprocess_clip(clip, PackConfig("in", "out")), EncodedClip)


@pytest.mark.parametrize("end", ["-1", "-1.0", ""])
def test_a_part_in_a_table_may_end_with_its_recording(tmp_path: Path, end: str) -> None:
    wav(tmp_path / "a.wav")
    (tmp_path / "clips.csv").write_text(f"path,start_seconds,end_seconds\na.wav,0.25,{end}\n")
    outcome = preprocess_clip(list_clips(tmp_path / "clips.csv", "speech").clips[0], PackConfig("in", "out"))
    assert isinstance(outcome, EncodedClip)
    assert outcome.num_samples == 18000


def test_a_quotation_mark_that_opens_a_cell_of_a_tsv_swallows_no_line(tmp_path: Path) -> None:
    texts = ['"open', "plain", 'he said "no', '"Hi," she said', 'closed "', '"all of it"', '"he said ""yes"""']
    for number in range(len(texts)):
        wav(tmp_path / f"{number}.wav")
    rows = ["path\ttext\tlanguage", *(f"{number}.wav\t{text}\ten" for number, text in enumerate(texts))]
    (tmp_path / "clips.tsv").write_text("\r\n".join(rows), encoding="utf-8")
    found = list_clips(tmp_path / "clips.tsv", "speech")
    assert [clip.text for clip in found.clips] == [*texts[:5], "all of it", 'he said "yes"']
    assert {clip.language for clip in found.clips} == {"en"}
    assert not found.invalid


def test_manifests_come_compressed_and_as_lists(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav")
    with gzip.open(tmp_path / "clips.jsonl.gz", "wt") as file:
        file.write('{"path": "a.wav"}\n')
    assert len(list_clips(tmp_path / "clips.jsonl.gz", "speech").clips) == 1
    assert len(find_audio([str(tmp_path / "clips.jsonl.gz")], tmp_path)[0]) == 1
    (tmp_path / "clips.json").write_text('[{"path": "a.wav"}]')
    with pytest.raises(UserError, match="one JSON object per line"):
        list_clips(tmp_path / "clips.json", "speech")


def test_a_table_may_have_spaces_behind_its_commas(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav")
    (tmp_path / "clips.csv").write_text("path, text\na.wav, hello\n")
    (clip,) = list_clips(tmp_path / "clips.csv", "speech").clips
    assert clip.text == "hello"


def test_half_a_character_is_a_bad_line_and_a_strange_name_is_none(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav")
    name = os.fsdecode(b"caf\xe9.wav")
    wav(tmp_path / name)
    lines = {"path": "a.wav", "text": "bad \ud800"}, {"path": "a.wav", "id": "ok"}, {"path": name}
    lines += ({"path": "a.wav", "id": "licence", "licence": "\ud800"},)
    source = manifest(tmp_path, *lines, {"path": "a\ud800.wav"}, {"path": "x" * 300 + ".wav"}, {"path": "a\0.wav"})
    found = list_clips(source, "speech")
    assert [clip.id for clip in found.clips] == ["ok", "caf\\xe9.wav"]
    assert [bad.fault for bad in found.invalid] == [Fault.LINE, Fault.LINE, Fault.FILE, Fault.FILE, Fault.FILE]
    report = pack(found, PackConfig("in", tmp_path / "out", max_invalid_fraction=1.0, num_workers=1))
    assert report.index["num_samples"] == 2


def test_ids_keep_their_dots_and_clashing_names_their_suffixes() -> None:
    names = ["spk1.utt001", "spk1.utt002", "take 2.0", "same.wav", "same.flac", "other.WAV"]
    places = [place.name for place in targets_of(names, ".npz")]
    assert places == [
        "spk1.utt001.npz",
        "spk1.utt002.npz",
        "take 2.0.npz",
        "same.wav.npz",
        "same.flac.npz",
        "other.npz",
    ]


def test_names_at_the_limits_of_the_file_system_are_kept_apart(tmp_path: Path) -> None:
    long = ["x" * 250 + ".wav", "x" * 249 + "y.wav"]
    places = targets_of([*long, "a\nb.wav", "tab\t.wav"], ".safetensors")
    assert len(set(places)) == 4
    for place in places:
        assert len(os.fsencode(place.name)) <= MAX_NAME_BYTES
        assert place.name.isprintable()
        with atomic_write(tmp_path / place) as temporary:
            temporary.touch()
        assert (tmp_path / place).exists()


def test_what_encode_names_decode_takes(tmp_path: Path) -> None:
    folder = tmp_path / "audio"
    for name in ("same.wav", "same.flac", "take 2.0.wav"):
        wav(folder / name)
    works = find_audio([str(folder)], tmp_path / "codes")[0]
    for work in works:
        work.target.parent.mkdir(exist_ok=True)
        work.target.touch()
    names = {work.target.name for work in find_codes([str(tmp_path / "codes")], tmp_path / "back", ".wav")}
    assert names == {"same.wav.wav", "same.flac.wav", "take 2.0.wav"}


def test_shards_keep_ids_that_only_differ_in_their_suffix(tmp_path: Path) -> None:
    for name in ("same.wav", "same.flac", "spk1.utt001.wav"):
        wav(tmp_path / "audio" / name)
    pack(list_clips(tmp_path / "audio", "speech"), PackConfig("in", tmp_path / "out", num_workers=1))
    ids = [name for name, _, _ in iterate_clips([tmp_path / "out"], sampling_rate=RATE, num_channels=1)]
    assert sorted(ids) == ["same.flac", "same.wav", "spk1.utt001.wav"]
    assert len(ShardIndex.load(tmp_path / "out")) == len(set(targets_of(ids, ".wav")))


def test_silence_is_counted(tmp_path: Path) -> None:
    wav(tmp_path / "audio/a.wav", TONE * 0)
    wav(tmp_path / "audio/b.wav")
    report = pack(list_clips(tmp_path / "audio", "speech"), PackConfig("in", tmp_path / "out", num_workers=1))
    assert report.remarks == {SILENT: 1}


@pytest.mark.processes
def test_commands_work_without_utf8_home_and_tmpdir(tmp_path: Path) -> None:
    """In one process, since importing takes longer than all else; `pack` says besides that all is silent."""
    name = "f\N{LATIN SMALL LETTER U WITH DIAERESIS}r"
    wav(tmp_path / f"audio/{name}.wav", TONE * 0)
    save_one_stage_model(tmp_path / "model", sampling_rate=RATE)
    commands = (
        ["pack", "input=audio", "out=shards"],
        ["encode", "model=model", "input=audio", "out=codes"],
        ["encode", "model=model", "shards=shards", "out=coded"],
        ["decode", "model=model", "input=codes", "out=back"],
        ["decode", "model=model", "input=coded", "out=again"],
    )
    program = (
        f"from moss_train.cli.main import main\nfor command in {commands!r}:\n    assert main(command) == 0, command"
    )
    environment = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert b"every clip is digital silence" in done.stdout
    ids = [name for name, _, _ in iterate_clips([tmp_path / "shards"], sampling_rate=RATE, num_channels=1)]
    assert ids == [f"{name}.wav"]
    assert (tmp_path / f"codes/{name}.safetensors").exists()
    assert (tmp_path / f"back/{name}.wav").exists()
    assert (tmp_path / f"again/{name}.wav").exists()


def test_silence_is_a_warning_of_the_run(tmp_path: Path) -> None:
    wav(tmp_path / "audio/a.wav", TONE * 0)
    packed = pack_cached(PackConfig(tmp_path / "audio", tmp_path / "cache"), heldout_fraction=0.0, key="data.path")
    assert packed.is_silent
    for _ in range(2):  # on every rank and after a resume
        warn_of_silence(tmp_path, "audio")
    assert (tmp_path / "warnings.txt").read_text().count("digital silence") == 1
