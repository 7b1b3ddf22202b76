"""Packing on a local Ray writes the same bytes, and a missing requirement is reported in one clear line."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from moss_train.commands import pack as pack_command
from moss_train.utils.errors import UserError

HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.mark.processes
@pytest.mark.nightly
@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed")
def test_ray_makes_the_same_bytes(packed: Path, recordings: Path, pack_config: Callable, tmp_path: Path) -> None:
    config = pack_config(input=recordings / "train.jsonl", out=tmp_path / "out", shard_bytes=300_000, executor="ray")
    assert pack_command.run(config) == 0
    for path in packed.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_ray_that_is_missing_is_said(recordings: Path, pack_config: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"executor=ray needs Ray: pip install 'moss_train\[cluster\]'"):
        pack_command.run(pack_config(input=recordings / "train.jsonl", out=tmp_path / "out", executor="ray"))
    assert list(tmp_path.iterdir()) == []


def test_other_executors_are_refused(recordings: Path, pack_config: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="executor=slurm has to be one of local, ray"):
        pack_command.run(pack_config(input=recordings / "train.jsonl", out=tmp_path / "out", executor="slurm"))
