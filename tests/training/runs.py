"""What tests of whole runs share."""

import subprocess
import time
from pathlib import Path

import pytest
import torch

from moss_train.training.callbacks.metrics import CLOCK_COLUMNS
from moss_train.training.loggers.base import column, read_table
from moss_train.utils.checkpoint import CHECKPOINT_FILE, list_checkpoints

FIT = ["-m", "moss_train", "fit"]
CLIPS = ("clips", "clips_with_text", "dropped_clips", "audio_seconds", "stage")


def values(directory: Path) -> list[dict[str, str]]:
    """Metrics of a run to the last bit, without what a clock measured."""
    rows = read_table(directory / "metrics.csv")
    return [{name: value for name, value in row.items() if name not in CLOCK_COLUMNS} for row in rows]


def state(directory: Path) -> dict:
    path = list_checkpoints(directory / "checkpoints")[-1] / CHECKPOINT_FILE
    return torch.load(path, weights_only=True)


def assert_equal(a: object, b: object, where: str = "") -> None:
    """Equal to the last bit, through containers."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def wait_for_rows(directory: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while len(read_table(directory / "metrics.csv")) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_same_course(directory: Path, whole: Path) -> None:
    """The same clips in every update to the last one, and losses within what another order of sums explains."""
    ours, theirs = read_table(directory / "metrics.csv"), read_table(whole / "metrics.csv")
    assert [[row[name] for name in CLIPS] for row in ours] == [[row[name] for name in CLIPS] for row in theirs]
    for name in ("loss/generator", "loss/semantic", "loss/discriminators", "loss/feature", "text_accuracy"):
        assert column(ours, name) == pytest.approx(column(theirs, name), rel=1e-3), name
    for name in ("progress", "callbacks"):
        counts = [state(run)[name] for run in (directory, whole)]
        assert_equal(*counts)
