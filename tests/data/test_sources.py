"""What `pack` takes: tables, Kaldi folders, saved datasets, parts of files, long files, filters, drop lists."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moss_train.audio.io import read_audio, resample, write_audio
from moss_train.commands import pack as pack_command
from moss_train.config.schema import PackConfig
from moss_train.data.pack.manifest import SourceClip, list_clips, read_drop_list
from moss_train.data.pack.preprocess import preprocess_segment, split_into_segments
from moss_train.data.shards.index import ShardIndex
from moss_train.utils.errors import UserError
from tests.data.packed_clips import iterate_clips


@pytest.fixture
def speech(recordings: Path) -> list[Path]:
    return sorted((recordings / "speech").glob("*.flac"))


def clips_of(folder: Path, sampling_rate: int = 24000) -> dict[str, tuple[torch.Tensor, dict]]:
    found = iterate_clips([folder], sampling_rate=sampling_rate, num_channels=1)
    return {sample_id: (audio, labels) for sample_id, audio, labels in found}


def test_a_table_is_read_like_a_manifest(tmp_path: Path, pack_config: Callable, speech: list[Path]) -> None:
    shutil.copy(speech[0], tmp_path / "ä.flac")
    rows = ["path\tid\ttext\tdomain\tstart_seconds\tend_seconds", 'ä.flac\ta\t"she said ""yes"""\tspeech\t\t']
    rows.append("ä.flac\tpart\t\t\t0.5\t1.0")
    (tmp_path / "m.tsv").write_text("\n".join(rows), encoding="utf-8-sig")
    assert pack_command.run(pack_config(input=tmp_path / "m.tsv", out=tmp_path / "out")) == 0
    clips = clips_of(tmp_path / "out")
    whole, labels = clips["a"]
    assert (labels["text"], labels["task"], labels["domain"]) == ('she said "yes"', "asr", "speech")
    assert torch.equal(clips["part"][0], whole[:, 12000:24000])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,text\nx,y\n", r"m\.csv:2: every row needs a 'path'"),
        (b"path\na.flac,extra\n", r"m\.csv:2: every row needs a 'path' and no more cells"),
        (b"path,start_seconds\na.flac,-1\n", r"m\.csv:2: a time has to be a number of seconds, 0 or more, got '-1'"),
        (b"path,start_seconds\na.flac,x\n", r"m\.csv:2: a time"),
        (b"path,text\na.flac,\xff\n", r"m\.csv:\d: not a line of UTF-8 CSV"),
        (b'path,text\na.flac,"open\n', r"m\.csv:\d: not a line of UTF-8 CSV"),
        (b"path\ngone.flac\n", r"m\.csv:2: no such file"),
    ],
)
def test_table_errors_name_the_line(tmp_path: Path, speech: list[Path], content: bytes, message: str) -> None:
    shutil.copy(speech[0], tmp_path / "a.flac")
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list_clips(tmp_path / "m.csv", "audio")


def make_kaldi(folder: Path, speech: list[Path]) -> Path:
    (folder / "wav").mkdir(parents=True)
    for number, path in enumerate(speech[:2]):
        shutil.copy(path, folder / "wav" / f"{number}.flac")
    (folder / "wav.scp").write_text("utt0 wav/0.flac\nutt1\twav/1.flac\n")
    (folder / "text").write_text("utt0 hello world\n")
    (folder / "utt2spk").write_text("utt0 anna\nutt1 bert\n")
    return folder


def test_a_kaldi_folder_keeps_names_text_and_speakers(
    tmp_path: Path, pack_config: Callable, speech: list[Path]
) -> None:
    folder = make_kaldi(tmp_path / "kaldi", speech)
    assert pack_command.run(pack_config(input=folder, out=tmp_path / "out", domain="speech")) == 0
    clips = clips_of(tmp_path / "out")
    assert torch.equal(clips["utt1"][0], read_audio(speech[1])[0])
    found = {name: (labels.get("text"), labels["speaker"]) for name, (_, labels) in clips.items()}
    assert found == {"utt0": ("hello world", "anna"), "utt1": (None, "bert")}
    (folder / "segments").write_text("seg-a utt1 0.25 1.0\n")
    (folder / "text").write_text("seg-a one\n")
    assert pack_command.run(pack_config(input=folder / "wav.scp", out=tmp_path / "parts")) == 0
    (audio, labels) = clips_of(tmp_path / "parts")["seg-a"]
    assert torch.equal(audio, read_audio(speech[1])[0][:, 6000:24000])
    assert labels["text"] == "one"


def test_other_separators_than_the_line_feed_end_no_line(tmp_path: Path, speech: list[Path]) -> None:
    folder = make_kaldi(tmp_path / "kaldi", speech)
    (folder / "text").write_text("utt0 one\u2028two\x85three\r\nutt1 four\n")
    assert [clip.text for clip in list_clips(folder, "speech").clips] == ["one\u2028two\x85three", "four"]
    (tmp_path / "drop.jsonl").write_text('{"id": "a\u2028b"}\r\n \n{"id": 7, "reason": "silent"}')
    assert read_drop_list(tmp_path / "drop.jsonl") == {"a\u2028b", "7"}


def test_commands_in_a_kaldi_folder_are_never_run(tmp_path: Path, speech: list[Path]) -> None:
    folder = make_kaldi(tmp_path / "kaldi", speech)
    (folder / "wav.scp").write_text(f"utt0 touch {tmp_path}/ran |\n")
    with pytest.raises(UserError, match=r"wav\.scp:1: utt0 is a command .* commands are not run"):
        list_clips(folder, "speech")
    assert not (tmp_path / "ran").exists()
    (folder / "wav.scp").write_text("utt0 wav/0.flac\nutt0 wav/1.flac\n")
    with pytest.raises(UserError, match=r"wav\.scp:2: 'utt0' is there twice, first at .*wav\.scp:1"):
        list_clips(folder, "speech")


def make_saved_dataset(folder: Path, speech: list[Path]) -> Path:
    pa = pytest.importorskip("pyarrow")
    (folder / "train").mkdir(parents=True)
    audio = [{"bytes": path.read_bytes(), "path": path.name} for path in speech[:2]]
    table = pa.table({"audio": audio, "sentence": ["one", None], "language": ["en", "en"]})
    with pa.OSFile(str(folder / "train" / "data-0.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "train" / "dataset_info.json").write_text("{}")
    (folder / "train" / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    return folder


def test_a_saved_dataset_is_packed_from_its_arrow_files(
    tmp_path: Path, pack_config: Callable, speech: list[Path]
) -> None:
    folder = make_saved_dataset(tmp_path / "saved", speech)
    config = pack_config(input=folder, out=tmp_path / "out", domain="speech", num_workers=2)
    assert pack_command.run(config) == 0
    clips = clips_of(tmp_path / "out")
    assert list(clips) == ["train/000000000", "train/000000001"]
    assert torch.equal(clips["train/000000001"][0], read_audio(speech[1])[0])
    assert clips["train/000000000"][1]["text"] == "one"
    assert "text" not in clips["train/000000001"][1]
    shutil.copytree(folder, tmp_path / "copy", copy_function=lambda source, copy: Path(copy).write_text("{}"))
    (tmp_path / "copy" / "train" / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    with pytest.raises(UserError, match=r"data-0\.arrow is not an Arrow file"):
        list_clips(tmp_path / "copy" / "train", "speech")


@pytest.mark.parametrize("rate", [24000, 44100, 16000])
def test_parts_of_a_long_file_join_to_the_whole(
    tmp_path: Path, pack_config: Callable, speech: list[Path], rate: int
) -> None:
    audio = torch.cat([read_audio(path)[0] for path in speech[:3]], dim=1)
    (tmp_path / "in").mkdir()
    write_audio(tmp_path / "in" / "long.flac", audio, rate)
    config = pack_config(input=tmp_path / "in", out=tmp_path / "out", segment_seconds=1.5, num_workers=1)
    assert pack_command.run(config) == 0
    clips = clips_of(tmp_path / "out")
    whole = resample(read_audio(tmp_path / "in" / "long.flac")[0], rate, 24000).clamp(-1, 1 - 2**-15)
    joined = torch.cat([part for part, _ in clips.values()], dim=1)
    assert joined.shape == whole.shape
    assert (joined - whole).abs().max() <= (1.01 if rate == 24000 else 1.5) / 32768
    assert max(part.shape[1] for part, _ in clips.values()) <= 1.51 * 24000
    starts = [float(name.rpartition("#")[2]) for name in clips]
    assert starts == sorted(starts)
    assert starts[0] == 0


def test_hours_are_cut_into_parts_that_fit(tmp_path: Path) -> None:
    segments = split_into_segments(0, 4 * 3600 * 44100 + 17, 44100, PackConfig("in", "out"))
    assert sum(map(len, segments)) == 4 * 3600 * 44100 + 17
    assert max(map(len, segments)) <= 60 * 44100 + 147
    assert all(segment.start % 147 == 0 for segment in segments)
    gone = preprocess_segment(segments[0], SourceClip(tmp_path / "gone.flac", "gone", "audio"), PackConfig("in", "out"))
    assert (gone.kind, "gone.flac" in gone.reason) == ("unreadable", True)


def test_filters_count_what_they_leave_out(
    tmp_path: Path, pack_config: Callable, speech: list[Path], capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(speech[0], tmp_path / "in" / "speech.flac")
    write_audio(tmp_path / "in" / "quiet.wav", torch.full((1, 24000), 1e-4), 24000)
    write_audio(tmp_path / "in" / "long.wav", torch.full((1, 24000 * 7), 0.1), 24000)
    (tmp_path / "drop.jsonl").write_text('{"id": "speech.flac", "reason": "bad"}\n\n{"id": "other"}\n')
    options = {"max_seconds": 6.0, "segment_seconds": None, "min_level_db": -60.0}
    config = pack_config(input=tmp_path / "in", out=tmp_path / "out", **options)
    assert pack_command.run(config) == 0
    assert list(clips_of(tmp_path / "out")) == ["speech.flac"]
    text = capsys.readouterr().out
    assert "skipped: 1 clip longer than max_seconds" in text
    assert "skipped: 1 clip quieter than min_level_db" in text
    config = config.replace(out=str(tmp_path / "two"), min_level_db=None, drop=str(tmp_path / "drop.jsonl"))
    assert pack_command.run(config) == 0
    assert list(clips_of(tmp_path / "two")) == ["quiet.wav"]
    assert "1 ids are not in" in capsys.readouterr().out
    (tmp_path / "drop.jsonl").write_text('{"id": "a"}\n["b"]\n')
    with pytest.raises(UserError, match=r"drop\.jsonl:2: not a JSON object with an 'id'"):
        pack_command.run(config.replace(out=str(tmp_path / "three")))
    with pytest.raises(UserError, match="max_seconds=0 has to be a number above 0"):
        pack_command.run(config.replace(max_seconds=0))


def test_what_the_drop_list_names_is_left_out_whatever_else_is_wrong_with_it(
    tmp_path: Path, pack_config: Callable, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "broken.wav").write_bytes(b"not audio")
    (folder / "link.wav").symlink_to(folder / "nowhere.wav")
    for name, seconds in (("good", 1.0), ("long", 5.0), ("part", 2.0), ("short", 0.05)):
        write_audio(folder / f"{name}.wav", torch.full((1, round(24000 * seconds)), 0.1), 24000)
    dropped = ["broken.wav", "link.wav", "long.wav", "part.wav#1.000", "short.wav", "typed wrongly"]
    (tmp_path / "drop.jsonl").write_text("".join(json.dumps({"id": name}) + "\n" for name in dropped))
    options = {"segment_seconds": 1.0, "drop": str(tmp_path / "drop.jsonl")}
    assert pack_command.run(pack_config(input=folder, out=tmp_path / "out", **options)) == 0
    assert list(clips_of(tmp_path / "out")) == ["good.wav", "part.wav#0.000"]
    text = capsys.readouterr().out
    assert "skipped: 5 clips named in the drop list" in text
    assert "1 ids are not in" in text


def test_the_index_of_the_parts_is_that_of_ordinary_clips(tmp_path: Path, pack_config: Callable, speech) -> None:
    config = pack_config(input=speech[0].parent, out=tmp_path / "out", segment_seconds=2.0)
    assert pack_command.run(config) == 0
    index = ShardIndex.load(tmp_path / "out")
    index.verify()
    total = json.loads((tmp_path / "out" / "index.json").read_text())["totals"]["domain"]["speech"]["hours"]
    assert total * 3600 * 24000 == pytest.approx(sum(read_audio(path)[0].shape[1] for path in speech))
