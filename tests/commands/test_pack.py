"""`pack` from the command line: its messages about interruptions and drop lists."""

import json
import shutil
from pathlib import Path

import pytest

from moss_train.cli.main import main
from moss_train.data.shards.index import ShardIndex


def test_finished_shards_are_announced_after_an_error_and_taken_over(
    tmp_path: Path, recordings: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for path in sorted((recordings / "speech").glob("*.flac")):
        shutil.copy(path, source)
    bad = source / "zz.wav"
    bad.write_text("no audio")
    arguments = ["pack", f"input={source}", f"out={tmp_path / 'out'}", "shard_bytes=200000", "num_workers=1"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "zz.wav is not audio" in error
    assert f"finished shards are kept in {tmp_path / '.out.partial'}" in error
    assert not (tmp_path / "out").exists()
    bad.unlink()
    assert main(arguments) == 0
    assert "reused from an earlier attempt: " in capsys.readouterr().out
    assert len(ShardIndex.load(tmp_path / "out")) == len(list(source.iterdir()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_parts_of_long_clips_can_be_dropped(tmp_path: Path, recordings: Path) -> None:
    drop = tmp_path / "drop.jsonl"
    base = ["pack", f"input={recordings / 'music'}", "segment_seconds=2", "num_workers=1"]
    assert main([*base, f"out={tmp_path / 'all'}"]) == 0
    drop.write_text(json.dumps({"id": "loop_amen_full.flac#0.000", "reason": "x"}))
    assert main([*base, f"out={tmp_path / 'rest'}", f"drop={drop}"]) == 0
    assert len(ShardIndex.load(tmp_path / "rest")) == len(ShardIndex.load(tmp_path / "all")) - 1
