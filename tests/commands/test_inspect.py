"""`inspect` from the command line: its report files, the exit status for damage, and its drop list in `pack`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moss_train.cli.main import main
from moss_train.commands import pack as pack_command
from moss_train.data.shards.index import ShardIndex


def test_the_report_is_written_and_its_list_is_taken_by_pack(
    packed: Path, recordings: Path, pack_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "report"
    arguments = ["clipped_share=0.0", "num_workers=1"]
    assert main(["inspect", f"shards={packed}", f"out={out}", *arguments]) == 0
    index = ShardIndex.load(packed)
    clips = [json.loads(line) for line in (out / "clips.jsonl").read_text().splitlines()]
    assert [clip["row"] for clip in clips] == list(range(len(index)))
    assert sum(clip["seconds"] for clip in clips) == pytest.approx(index.arrays["num_samples"].sum() / 24000)
    dropped = [json.loads(line) for line in (out / "drop.jsonl").read_text().splitlines()]
    assert dropped
    assert all(entry["reason"].startswith(("clipped", "duplicate", "silent")) for entry in dropped)
    page = (out / "report.html").read_text()
    for text in ("Hours by language", "report.png", "players/9.flac", "has the size and the hash", dropped[0]["id"]):
        assert text in page
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((out / "players").iterdir())) == 10
    assert f"{len(index)} clips, {len(dropped)} to drop" in capsys.readouterr().out
    config = pack_config(input=recordings / "train.jsonl", out=tmp_path / "clean", drop=out / "drop.jsonl")
    assert pack_command.run(config) == 0
    assert len(ShardIndex.load(tmp_path / "clean")) == len(index) - len(dropped)


def test_damage_is_in_the_exit_status_and_on_the_page(packed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    location = ShardIndex.load(copy).locate(0)
    with Path(location.shard).open("r+b") as file:
        file.seek(location.audio_offset + location.audio_size // 2)
        file.write(b"\x00\xff" * 8)
    assert main(["inspect", f"shards=[{copy}]", f"out={tmp_path / 'report'}", "num_workers=2"]) == 1
    page = (tmp_path / "report" / "report.html").read_text()
    assert "its hash differs from the index" in page
    assert "unreadable: " in (tmp_path / "report" / "drop.jsonl").read_text()


def test_the_report_does_not_go_into_the_shards(packed: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", f"shards={packed}", f"out={packed}"]) == 2
    assert "is a folder of shards" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_refused_before_any_clip_is_read(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["inspect", f"shards={packed}", f"out={tmp_path / 'file'}"]) == 2
    assert capsys.readouterr().err == f"moss_train inspect: {tmp_path / 'file'}: File exists\n"  # no line of progress
