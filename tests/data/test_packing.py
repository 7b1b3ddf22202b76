"""`pack`: the content of the shards, identical bytes every time, and one clear line for every kind of bad input."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from moss_train.audio.io import read_audio, write_audio
from moss_train.commands import pack as pack_command
from moss_train.config.schema import PackConfig
from moss_train.data.pack import pack as packing
from moss_train.data.pack.manifest import SourceClip, SourceList, list_clips
from moss_train.data.shards.index import ShardIndex
from moss_train.utils.errors import UserError
from tests.data.packed_clips import iterate_clips


def manifest_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_packed_clips_are_the_recordings(packed: Path, recordings: Path) -> None:
    entries = {entry["path"]: entry for entry in manifest_of(recordings / "train.jsonl")}
    seen = 0
    for sample_id, audio, labels in iterate_clips([packed], sampling_rate=24000, num_channels=1):
        original, _ = read_audio(recordings / sample_id)
        assert torch.equal(audio, original)
        for key in ("text", "domain", "task", "language", "speaker"):
            assert labels.get(key) == entries[sample_id].get(key)
        seen += 1
    long_enough = [path for path in entries if read_audio(recordings / path)[0].shape[1] >= 2400]
    assert seen == len(long_enough) < len(entries)


def test_shards_are_plain_webdataset_tars_of_one_domain(packed: Path) -> None:
    index = ShardIndex.load(packed)
    assert len({shard.domain for shard in index.shards}) == 3
    assert len(index.shards) > 6
    keys = []
    for shard in index.shards:
        assert shard.file.startswith(f"{shard.domain}-")
        with tarfile.open(packed / shard.file) as tar:
            names = tar.getnames()
            texts = [json.loads(tar.extractfile(name).read()) for name in names[1::2]]
        assert names[1::2] == [name.removesuffix("flac") + "json" for name in names[::2]]
        assert {text["domain"] for text in texts} == {shard.domain}
        keys += names
    assert len(set(keys)) == len(keys) == 2 * len(index)


def test_totals_add_up(packed: Path) -> None:
    index = json.loads((packed / "index.json").read_text())
    arrays = ShardIndex.load(packed).arrays
    hours = arrays["num_samples"].sum() / 24000 / 3600
    for groups in index["totals"].values():
        assert sum(group["clips"] for group in groups.values()) == index["num_samples"] == len(arrays["has_text"])
        assert sum(group["with_text"] for group in groups.values()) == arrays["has_text"].sum()
        assert sum(group["hours"] for group in groups.values()) == pytest.approx(hours)
    assert sum(shard["seconds"] for shard in index["shards"]) == pytest.approx(hours * 3600)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, pack_config: Callable, recordings: Path) -> None:
    for name in ("one", "two"):
        config = pack_config(input=recordings / "heldout.jsonl", out=tmp_path / name, sampling_rate=16000)
        assert pack_command.run(config) == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "index.safetensors" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    ShardIndex.load(tmp_path / "two").verify()


def test_a_folder_tree_is_resampled_and_given_the_domain(
    tmp_path: Path, pack_config: Callable, recordings: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "in"
    (source / "sub.dir" / ".hidden").mkdir(parents=True)
    speech = sorted((recordings / "speech").glob("*.flac"))[0]
    audio, _ = read_audio(speech)
    soundfile.write(source / "a.b.ogg", audio[0].numpy(), 24000)
    shutil.copy(speech, source / "sub.dir" / "äö ü.FLAC")
    shutil.copy(speech, source / "sub.dir" / ".hidden" / "x.flac")
    (source / "readme.txt").write_text("no audio")
    (source / "sub.dir" / "loop").symlink_to(source)
    config = pack_config(input=source, out=tmp_path / "out", sampling_rate=48000, num_channels=2, domain="speech")
    assert pack_command.run(config) == 0
    clips = list(iterate_clips([tmp_path / "out"], sampling_rate=48000, num_channels=2))
    assert [sample_id for sample_id, _, _ in clips] == ["a.b.ogg", "sub.dir/äö ü.FLAC"]
    for _, packed_audio, labels in clips:
        assert packed_audio.shape == (2, 2 * audio.shape[1])
        assert labels["domain"] == "speech"
        assert "text" not in labels
    assert ".txt (1)" in capsys.readouterr().out


def test_text_without_a_task_gets_one(tmp_path: Path, pack_config: Callable, recordings: Path) -> None:
    path = str(sorted((recordings / "speech").glob("*.flac"))[0])
    lines = [
        {"path": path, "id": "s", "text": " hello ", "domain": "speech"},
        {"path": path, "id": "a", "text": "a voice"},
        {"path": path, "id": "m", "text": "drums", "domain": "music"},
    ]
    lines.append({"path": path, "id": "none", "text": "  ", "task": "asr"})
    (tmp_path / "m.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    assert pack_command.run(pack_config(input=tmp_path / "m.jsonl", out=tmp_path / "out")) == 0
    clips = iterate_clips([tmp_path / "out"], sampling_rate=24000, num_channels=1)
    found = {sample_id: (labels.get("text"), labels.get("task")) for sample_id, _, labels in clips}
    assert found == {"s": ("hello", "asr"), "a": ("a voice", "asr"), "m": ("drums", "caption"), "none": (None, None)}


MANIFEST_ERRORS = {
    "not JSON": (["{not json"], r"m\.jsonl:2: not a line of JSON"),
    "no path": (['{"text": "x"}'], r"m\.jsonl:2: every line has to be a JSON object with a 'path'"),
    "a list": (["[1]"], r"m\.jsonl:2: every line"),
    "wrong type": (['{"path": "a.flac", "text": 3}'], r"m\.jsonl:2: 'text' has to be a string, got 3"),
    "missing file": (['{"path": "gone.flac"}'], r"m\.jsonl:2: no such file: .*gone\.flac"),
    "unknown task": (
        ['{"path": "a.flac", "id": "b", "text": "x", "task": "tts"}'],
        r"m\.jsonl:2: .*'tts'.*asr, multi_",
    ),
    "domain": (['{"path": "a.flac", "id": "b", "domain": "../x"}'], r"m\.jsonl:2: domain '\.\./x'"),
    "twice": (['{"path": "a.flac"}'], r"m\.jsonl:2: 'a\.flac' is already on line 1"),
}


@pytest.mark.parametrize("case", MANIFEST_ERRORS)
def test_manifest_errors_name_the_line(tmp_path: Path, pack_config: Callable, recordings: Path, case: str) -> None:
    lines, message = MANIFEST_ERRORS[case]
    shutil.copy(sorted((recordings / "speech").glob("*.flac"))[0], tmp_path / "a.flac")
    (tmp_path / "m.jsonl").write_text("\n".join(['{"path": "a.flac"}', *lines]))
    check_refused(tmp_path, pack_config(input=tmp_path / "m.jsonl", out=tmp_path / "out"), message)


def check_refused(folder: Path, config: PackConfig, message: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        pack_command.run(config)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before  # no half-written files remain


def test_bad_folders_are_refused(tmp_path: Path, pack_config: Callable) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.m4a").touch()
    (tmp_path / "list.txt").touch()
    (tmp_path / "m.jsonl").touch()
    out = tmp_path / "out"
    check_refused(tmp_path, pack_config(input=tmp_path / "gone", out=out), "input=.*gone does not exist")
    check_refused(tmp_path, pack_config(input=tmp_path / "empty", out=out), "no audio files .found no files")
    check_refused(tmp_path, pack_config(input=tmp_path / "texts", out=out), r"no audio files .found 1 \.m4a")
    check_refused(tmp_path, pack_config(input=tmp_path / "list.txt", out=out), "neither a folder nor an audio file")
    check_refused(tmp_path, pack_config(input=tmp_path / "m.jsonl", out=out), "has no lines")
    check_refused(tmp_path, pack_config(input=tmp_path / "texts", out=out, domain="a/b"), "domain: domain 'a/b'")
    with pytest.raises(UserError, match="sampling_rate=0 has to be a whole number from 2000"):
        pack_config(input=tmp_path, out=out, sampling_rate=0)


def make_bad_file(folder: Path, kind: str) -> str:
    """Put a bad file into a folder and return the expected part of the error message."""
    path = folder / "zz.wav"
    if kind == "text":
        path.write_text("this is text")
        return r"zz\.wav is not audio"
    if kind == "rate":
        soundfile.write(path, np.zeros(100), 1)
        return r"zz\.wav has a sampling rate of 1 Hz"
    samples = {"nan": [0.0, np.nan], "inf": [0.0, np.inf], "integers": [0.0, 30000.0]}[kind]
    soundfile.write(path, np.array(samples * 5000, np.float32), 24000, subtype="FLOAT")
    return r"zz\.wav has samples up to 3e\+04" if kind == "integers" else r"zz\.wav contains NaN or infinite"


@pytest.mark.parametrize("kind", ["text", "rate", "nan", "inf", "integers"])
def test_a_bad_file_stops_or_is_left_out(
    tmp_path: Path, pack_config: Callable, recordings: Path, capsys: pytest.CaptureFixture, kind: str
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(sorted((recordings / "speech").glob("*.flac"))[0], source / "a.flac")
    message = make_bad_file(source, kind)
    config = pack_config(input=source, out=tmp_path / "out")
    check_refused(tmp_path, config, message + ".*max_invalid_fraction")
    check_refused(
        tmp_path,
        config.replace(max_invalid_fraction=0.4),
        r"1 of 2 clips cannot be used \(1 \w+\), more than max_invalid_fraction=0.4",
    )
    assert pack_command.run(config.replace(max_invalid_fraction=0.5)) == 0
    assert len(ShardIndex.load(tmp_path / "out")) == 1
    assert "skipped: 1 clip that cannot be used (1 " in capsys.readouterr().out


def test_only_short_clips_is_an_error(tmp_path: Path, pack_config: Callable) -> None:
    (tmp_path / "in").mkdir()
    write_audio(tmp_path / "in" / "short.wav", torch.full((1, 10), 0.1), 24000)
    write_audio(tmp_path / "in" / "none.wav", torch.zeros(1, 0), 24000)
    config = pack_config(input=tmp_path / "in", out=tmp_path / "out")
    check_refused(tmp_path, config, "nothing to pack, 2 clips are shorter than min_seconds=0.1")
    assert pack_command.run(config.replace(min_seconds=0)) == 0
    assert ShardIndex.load(tmp_path / "out").arrays["num_samples"].tolist() == [10]


def test_out_is_replaced_only_when_asked_and_only_if_it_is_packed(
    tmp_path: Path, pack_config: Callable, recordings: Path
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    shutil.copy(sorted((recordings / "speech").glob("*.flac"))[0], source / "a.flac")
    out.mkdir()
    config = pack_config(input=source, out=out)
    assert pack_command.run(config) == 0  # an empty folder is fine
    check_refused(tmp_path, config, "out=.* exists and is not empty")
    (out / "extra").touch()
    assert pack_command.run(config.replace(overwrite=True)) == 0
    assert not (out / "extra").exists()
    (out / "index.json").unlink()
    check_refused(tmp_path, config.replace(overwrite=True), "not a folder of packed shards")
    check_refused(tmp_path, config.replace(out=str(source / "a.flac")), "exists and is not a folder")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing_and_keeps_the_earlier_result(
    tmp_path: Path, recordings: Path, error: type[BaseException]
) -> None:
    clips = SourceList(
        recordings,
        tuple(SourceClip(path, path.name, "speech") for path in sorted((recordings / "speech").glob("*.flac"))[:2]),
    )
    options = PackConfig(recordings, tmp_path / "out")
    packing.pack(clips, options)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    def interrupt(seconds: float) -> None:
        raise error

    with pytest.raises(error):
        packing.pack(clips, options.replace(overwrite=True), on_clip=interrupt)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_bad_lines_are_counted_by_kind_and_stop_above_the_ceiling(
    tmp_path: Path, recordings: Path, capsys: pytest.CaptureFixture, pack_config: Callable
) -> None:
    paths = [str(path) for path in sorted((recordings / "speech").glob("*.flac"))[:6]]
    lines = [json.dumps({"path": path}).encode() for path in paths]
    bad = [
        b'{"path": "cut of',
        b'{"path": "\xff.flac"}',
        b'{"text": "no path"}',
        json.dumps({"path": paths[0], "id": "x", "text": "a", "task": "tts"}).encode(),
        json.dumps({"path": "gone.flac"}).encode(),
        lines[0],
    ]
    manifest = tmp_path / "list.jsonl"
    manifest.write_bytes(b"\n".join([*lines[:3], *bad, *lines[3:]]) + b"\n")
    config = pack_config(input=manifest, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"list\.jsonl:4: not a line of JSON .*max_invalid_fraction=0\.01"):
        pack_command.run(config)
    message = (
        r"6 of 12 clips cannot be used \(4 line, 1 missing file, 1 repeated id\), more than max_invalid_fraction=0\.4"
    )
    with pytest.raises(UserError, match=message):
        pack_command.run(config.replace(max_invalid_fraction=0.4))
    assert not (tmp_path / "out").exists()
    assert pack_command.run(config.replace(max_invalid_fraction=0.5)) == 0
    printed = capsys.readouterr().out
    assert "skipped: 6 clips that cannot be used (4 line, 1 missing file, 1 repeated id)" in printed
    assert "list.jsonl:4: not a line of JSON" in printed
    assert [name for name, _, _ in iterate_clips([tmp_path / "out"], sampling_rate=24000, num_channels=1)] == paths


def test_bad_rows_of_a_table_are_counted(tmp_path: Path, recordings: Path) -> None:
    path = next((recordings / "speech").glob("*.flac"))
    rows = [
        "path,text,start_seconds",
        f'{path},"a ""b"" c",',
        "\udcff.flac,x,",
        f'{path},"open" x,',
        "a,b,c,d",
        f"{path},x,soon",
    ]
    manifest = tmp_path / "list.csv"
    manifest.write_bytes("\n".join(rows).encode("utf-8", "surrogateescape"))
    found = list_clips(manifest, "speech")
    assert [clip.text for clip in found.clips] == ['a "b" c']
    assert [where.rpartition(":")[2] for where, *_ in found.invalid] == ["3", "4", "5", "6"]
    reasons = " ".join(reason for _, reason, _ in found.invalid)
    for part in ("not a line of UTF-8 CSV", "no more cells than the header", "a time has to be a number"):
        assert part in reasons


@pytest.mark.parametrize("domain", ["all", "update"])
def test_domains_cannot_be_called_like_columns_of_the_tables(tmp_path: Path, recordings: Path, domain: str) -> None:
    manifest = tmp_path / "list.jsonl"
    manifest.write_text(json.dumps({"path": str(next(recordings.glob("speech/*.flac"))), "domain": domain}) + "\n")
    with pytest.raises(UserError, match=f"the domain cannot be called '{domain}'"):
        list_clips(manifest, "speech")
    with pytest.raises(UserError, match="rename it"):
        list_clips(recordings / "speech", domain)
