"""`evaluate` from the command line, with a small model and real recordings."""

import csv
import json
import re
from pathlib import Path

import pytest

from moss_train.audio.io import read_audio, write_audio
from moss_train.cli.main import main
from moss_train.utils.files import file_lock
from tests.model.small_models import save_one_stage_model

PAIRS = Path(__file__).parents[1] / "data" / "metrics"
FAST = ["metrics=[stoi,spectral,si_sdr]", "report_clips=1", "device=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, recordings) -> Path:
    """Return a folder with a small model and a manifest of real clips, one of them damaged."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_one_stage_model(folder / "small", num_quantizers=4)
    speech = sorted(recordings.glob("speech/*.flac"))[:2]
    sound = sorted(recordings.glob("sound/*.flac"))[0]
    lines = [{"path": str(path), "id": path.stem, "domain": "speech", "text": "hello"} for path in speech]
    lines.append({"path": str(sound), "id": "sound", "domain": "sound"})
    (folder / "bad.wav").write_bytes(b"RIFF nothing")
    (folder / "good.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines.append({"path": "bad.wav", "domain": "sound"})
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rows_of(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "table.csv").read_text().splitlines()))


def test_a_model_is_measured_at_every_depth_and_domain(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = ["evaluate", "model=small", "data=all.jsonl", "num_quantizers=[1,4]", "out=out", *FAST]
    assert main(arguments) == 1  # as for every command that had to skip something
    captured = capsys.readouterr()
    assert "3 of 4 clips" in captured.out
    assert "skipped: " in captured.err
    assert "bad.wav is not audio" in captured.err
    rows = rows_of(folder / "out")
    assert [row["domain"] for row in rows[::4]] == ["sound", "speech", "all"]
    assert [row["system"] for row in rows[:4]] == ["small", "small", "resample-only", "mismatched"]
    assert [row["bps"] for row in rows[:2]] == ["250.0", "1000.0"]
    assert 0 < float(rows[1]["effective_bps"]) <= 1000
    assert rows[0]["stoi"] == ""  # sounds are not speech
    assert float(rows[6]["stoi"]) == pytest.approx(1.0)
    assert float(rows[6]["mel_loss"]) == 0.0
    assert (rows[0]["clips"], rows[0]["failed"]) == ("2", "1")
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"per_clip.jsonl", "table.md", "codebook.csv", "results.json", "report.html"} <= names
    assert len(list((folder / "out" / "audio").glob("*/*.flac"))) == 5  # the original, two depths, two anchors


def test_the_rows_of_a_depth_are_those_of_a_run_at_that_depth(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for name, levels in (("deep", "[1,2,4]"), ("two", "[2]")):
        assert (
            main(["evaluate", "model=small", "data=good.jsonl", f"num_quantizers={levels}", f"out={name}", *FAST]) == 0
        )
    deep, two = ([row for row in rows_of(folder / name) if row["num_quantizers"] == "2"] for name in ("deep", "two"))
    for first, second in zip(deep, two, strict=True):
        assert first | {"real_time_factor": ""} == second | {"real_time_factor": ""}


def test_more_levels_in_the_same_folder(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for levels, expected in (("[1]", ["1"]), ("[2]", ["1", "2"])):
        arguments = ["evaluate", "model=small", "data=good.jsonl", f"num_quantizers={levels}", "out=more", *FAST]
        assert main(arguments) == 0
        rows = rows_of(folder / "more")
        assert [row["num_quantizers"] for row in rows if row["domain"] == "all" and row["num_quantizers"]] == expected
    heard = {path.name for path in (folder / "more" / "audio").glob("*/*.flac")}
    assert {"original.flac", "small_1.flac", "small_2.flac"} <= heard


def test_the_clips_of_the_report_can_be_named(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = ["evaluate", "model=small", "data=good.jsonl", "out=named", "num_quantizers=[1]", *FAST]
    assert main([*arguments, "report_clips=[sound]", "anchors=false"]) == 0
    assert re.findall('data-clip="(.*?)"', (folder / "named" / "report.html").read_text()) == ["sound"]


def test_pieces_and_subsets(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = ["evaluate", "model=small", "data=good.jsonl", "out=pieces", "clip_seconds=0.5", "max_clips=2", *FAST]
    assert main([*arguments, "num_quantizers=[4]", "anchors=false"]) == 0
    assert [(row["domain"], row["clips"]) for row in rows_of(folder / "pieces")][1] == ("speech", "2")
    assert all("@" in json.loads(line)["clip"] for line in (folder / "pieces/per_clip.jsonl").read_text().splitlines())


def test_clips_are_scaled_to_a_peak_like_in_training(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = ["evaluate", "model=small", "data=good.jsonl", "out=scaled", "num_quantizers=[4]", *FAST]
    assert main([*arguments, "anchors=false", "peak=0.7"]) == 0
    originals = list((folder / "scaled" / "audio").glob("*/original.flac"))
    assert len(originals) == 2  # one per domain
    for path in originals:
        assert read_audio(path)[0].abs().max().item() == pytest.approx(0.7, abs=2**-15)
    assert main([*arguments, "anchors=false", "peak=0.5"]) == 2  # results at two peak levels cannot share a table
    assert "peak" in capsys.readouterr().err


def test_shards_give_the_same_numbers_as_their_files(packed, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = ["evaluate", "model=small", f"data={packed}", "out=shards", "max_clips=1", "num_quantizers=[4]"]
    assert main([*arguments, "anchors=false", *FAST]) == 0
    lines = [json.loads(line) for line in (folder / "shards/per_clip.jsonl").read_text().splitlines()]
    assert {line["domain"] for line in lines} == {"speech", "music", "sound"}
    assert all(line["failure"] is None for line in lines)


def test_pairs_of_files_and_a_comparison(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for side in ("gt_audios", "syn_audios"):
        (tmp_path / "first" / side).mkdir(parents=True)
        (tmp_path / "second" / side).mkdir(parents=True)
        for path in sorted((PAIRS / side).glob("pocketsphinx_963*.flac")):
            audio, rate = read_audio(path)
            write_audio(tmp_path / "first" / side / path.name, audio, rate)
            write_audio(tmp_path / "second" / side / path.name, audio * (0.9 if side == "syn_audios" else 1), rate)
    assert main(["evaluate", "pairs=second", "out=out2", *FAST]) == 0
    assert main(["evaluate", "pairs=first", "out=out1", "compare=[out2]", *FAST]) == 0
    output = capsys.readouterr().out
    assert "## Against out2" in output
    expected = json.loads((PAIRS / "expected.json").read_text())["per_file"]
    values = [expected[path.name]["stoi"] for path in (tmp_path / "first" / "gt_audios").iterdir()]
    assert float(rows_of(tmp_path / "out1")[0]["stoi"]) == pytest.approx(sum(values) / len(values), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=good.jsonl"], "model is required: give one of model=, codec= and pairs="),
        (
            ["model=small", "pairs=x", "data=good.jsonl"],
            "pairs=x excludes model: give one of model=, codec= and pairs=",
        ),
        (["model=small"], "data is required: give audio to measure on"),
        (["pairs=x"], "pairs=x does not exist"),
        (["pairs=x", "data=good.jsonl"], "data=['good.jsonl'] has no effect with pairs="),
        (["pairs=x", "peak=0.7"], "peak=0.7 has no effect with pairs="),
        (["model=small", "data=good.jsonl", "peak=1.5"], "peak=1.5 has to be a number above 0 and at most 1"),
        (["model=small", "data=good.jsonl", "profile=44k"], "profile=44k has to be one of official, dac24k, full48k"),
        (["model=small", "data=good.jsonl", "metrics=[mos]"], "metrics.0=mos has to be one of text_model, stoi"),
        (
            ["model=small", "data=good.jsonl", "num_quantizers=[5]"],
            "num_quantizers=[5]: small has levels 1 to 4, got 5",
        ),
        (["model=small", "data=good.jsonl", "num_workers=-1"], "num_workers=-1 has to be a whole number at least 0"),
        (
            ["model=small", "data=good.jsonl", "clip_seconds=900"],
            "no clip of data=['good.jsonl'] is clip_seconds=900 long",
        ),
        (["codec=bigcodec", "data=good.jsonl"], "codec=bigcodec needs weights="),
        (["model=small", "data=good.jsonl", "report_clips=[nothing]"], "report_clips=['nothing']: there is no clip"),
        (["model=small", "data=good.jsonl", "weights=x"], "weights=x has no effect without codec="),
        (
            ["model=small", "data=good.jsonl", "metrics=[speaker]", "strict=true"],
            "metric speaker: no weights: give speaker_model=",
        ),
    ],
)
def test_wrong_options_are_one_line(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    assert main(["evaluate", "out=nothing", *arguments]) == 2
    text = capsys.readouterr().err
    assert text.splitlines()[-1].startswith(f"moss_train evaluate: {message}")
    assert "Traceback" not in text
    assert not Path("nothing").exists()


def test_two_evaluations_cannot_write_to_one_folder(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    Path("shared").mkdir()
    with file_lock(Path("shared"), "shared", 0.0):
        assert main(["evaluate", "model=small", "data=good.jsonl", "out=shared", "metrics=[si_sdr]"]) == 2
    assert "shared is in use by another process" in capsys.readouterr().err


def test_a_metric_that_is_missing_is_a_footnote(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = ["evaluate", "model=small", "data=good.jsonl", "out=footnote", "max_clips=1", "num_quantizers=[4]"]
    assert main([*arguments, "metrics=[spectral,speaker]", "speaker=wavlm", "report_clips=0", "device=cpu"]) == 0
    assert "Not available: speaker: no weights: give speaker_model=" in capsys.readouterr().out


def test_measures_of_speech_without_speech_are_explained(folder, recordings, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    sound = sorted(recordings.glob("sound/*.flac"))[0]
    (folder / "music.jsonl").write_text(json.dumps({"path": str(sound)}) + "\n")
    arguments = ["evaluate", "model=small", "data=music.jsonl", "domain=music", "out=music", "num_quantizers=[4]"]
    assert main([*arguments, "metrics=[stoi,si_sdr]", "anchors=false"]) == 0
    assert "STOI: only of clips of the domain speech, of which there are none here." in capsys.readouterr().out
