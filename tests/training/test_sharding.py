"""Runs of two processes with sharded tokenizer and text LM (FSDP2), from the command line."""

import shutil
import signal
from pathlib import Path

import pytest

from moss_train.cli.main import main
from moss_train.training.loggers.base import read_table
from moss_train.utils.checkpoint import list_checkpoints

from ..faults.harness import Launcher, assert_same_run, state
from .gradients import network_errors
from .runs import assert_same_course, wait_for_end, wait_for_rows

SHARDED = "trainer.strategy=fsdp"


@pytest.fixture(scope="module")
def sharded(launcher: Launcher, small_overrides, packed, tmp_path_factory) -> Path:
    """Run the small recipe with two processes, sharded tokenizer and text LM, averaged weights and validation."""
    directory = tmp_path_factory.mktemp("runs") / "sharded"
    arguments = ("fit", *small_overrides, f"run_dir={directory}", SHARDED, *watched(packed))
    wait_for_end(launcher.start_ranks(*arguments))
    return directory


def watched(packed: Path) -> list[str]:
    validation = {"data": packed, "max_clips": 2, "every_updates": 4, "samples_every_updates": 8}
    return ["ema={decay: 0.9}", *(f"validation.{name}={value}" for name, value in validation.items())]


def newest_removed(source: Path, directory: Path) -> Path:
    """Copy a finished run without its newest checkpoint, so that the last updates have to be repeated."""
    shutil.copytree(source, directory)
    shutil.rmtree(list_checkpoints(directory / "checkpoints")[-1])
    return directory


def test_sharded_processes_train_like_one(sharded, whole):
    assert_same_course(sharded, whole)


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_killed_sharded_run_goes_on_to_the_last_bit(launcher, small_overrides, sharded, packed, tmp_path, background):
    """Also with checkpoints that a thread writes during training; neither way changes a value of the run."""
    directory = tmp_path / "run"
    options = (SHARDED, f"checkpoint.background={background}", *watched(packed))
    arguments = ("fit", *small_overrides, f"run_dir={directory}", *options)
    ranks = launcher.start_ranks(*arguments)
    wait_for_rows(directory, 3, ranks[0])
    ranks[0].send(signal.SIGKILL)
    assert ranks[1].wait().status != 0
    wait_for_end(launcher.start_ranks(*arguments))
    assert_same_run(directory, sharded)
    tables = [read_table(run / "validation.csv") for run in (directory, sharded)]
    assert [row["mel_distance"] for row in tables[0]] == [row["mel_distance"] for row in tables[1]]


def test_a_run_goes_on_with_another_strategy(small_overrides, launcher, sharded, whole, packed, tmp_path):
    """A checkpoint of sharded processes is continued by one process, with averaged weights, and vice versa."""
    alone = newest_removed(sharded, tmp_path / "alone")
    assert main(["fit", *small_overrides, f"run_dir={alone}", *watched(packed)]) == 0
    together = newest_removed(whole, tmp_path / "together")
    wait_for_end(launcher.start_ranks("fit", *small_overrides, f"run_dir={together}", SHARDED))
    for directory, other in ((alone, sharded), (together, whole)):
        assert_same_course(directory, other)
        found, expected = state(directory)["state_dict"], state(other)["state_dict"]
        assert found.keys() == expected.keys()
        errors = network_errors(found, expected)
        assert max(errors.values()) < 1e-4, errors
