"""Runs of two processes that share tokenizer and text LM (FSDP2), from the command line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moss_train.cli.main import main
from moss_train.training.loggers.base import read_table
from moss_train.utils.checkpoint import list_checkpoints

from .gradients import network_errors
from .runs import FIT, assert_equal, assert_same_course, state, values, wait_for_rows

pytestmark = pytest.mark.processes

SHARDED = ("trainer.devices=2", "trainer.strategy=fsdp")


@pytest.fixture(scope="module")
def sharded(small_overrides, packed, tmp_path_factory) -> Path:
    """The small recipe by two processes that share tokenizer and text LM, with averaged weights and validation."""
    directory = tmp_path_factory.mktemp("runs") / "sharded"
    command = [sys.executable, *FIT, *small_overrides, f"run_dir={directory}", *SHARDED, *watched(packed)]
    assert subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
    return directory


def watched(packed: Path) -> list[str]:
    validation = {"data": packed, "max_clips": 2, "every_updates": 4, "samples_every_updates": 8}
    return ["ema={decay: 0.9}", *(f"validation.{name}={value}" for name, value in validation.items())]


def newest_removed(source: Path, directory: Path) -> Path:
    """A copy of a finished run that has to do its last updates again."""
    shutil.copytree(source, directory)
    shutil.rmtree(list_checkpoints(directory / "checkpoints")[-1])
    return directory


def test_sharded_processes_train_like_one(sharded, whole):
    assert_same_course(sharded, whole)


def test_a_killed_sharded_run_goes_on_to_the_last_bit(start, sharded, packed, tmp_path):
    directory = tmp_path / "run"
    process = start(directory, *SHARDED, *watched(packed))
    wait_for_rows(directory, 3, process)
    process.kill()
    process.wait()
    assert start(directory, *SHARDED, *watched(packed)).wait(timeout=240) == 0
    assert values(directory) == values(sharded)
    assert_equal(state(directory), state(sharded))
    tables = [read_table(run / "validation.csv") for run in (directory, sharded)]
    assert [row["mel_distance"] for row in tables[0]] == [row["mel_distance"] for row in tables[1]]


def test_a_run_goes_on_with_another_strategy(small_overrides, start, sharded, whole, packed, tmp_path):
    """A checkpoint of sharded processes for one process, with its averaged weights, and the other way round."""
    alone = newest_removed(sharded, tmp_path / "alone")
    assert main(["fit", *small_overrides, f"run_dir={alone}", *watched(packed)]) == 0
    together = newest_removed(whole, tmp_path / "together")
    assert start(together, *SHARDED).wait(timeout=240) == 0
    for directory, other in ((alone, sharded), (together, whole)):
        assert_same_course(directory, other)
        found, expected = state(directory)["state_dict"], state(other)["state_dict"]
        assert found.keys() == expected.keys()
        errors = network_errors(found, expected)
        assert max(errors.values()) < 1e-4, errors
