"""Helpers for tests of whole runs."""

import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch

from moss_train.audio.io import write_audio
from moss_train.training.loggers.base import ClipSample, read_table

from ..faults.harness import LIMIT_SECONDS, Job, assert_equal, state

FIT = ["-m", "moss_train", "fit"]
CLIPS = ("clips", "clips_with_text", "dropped_clips", "audio_seconds", "stage")


def silent_sample(directory: Path, update: int) -> ClipSample:
    """Return the validation output for one clip, as it is passed to the loggers."""
    path = directory / "levels-04.flac"
    write_audio(path, torch.zeros(1, 2400), 24000)
    return ClipSample(update, "1-clip", {"levels-04": path}, None, {"truth": "seven", "levels-04": "sieben"})


def column(rows: Iterable[dict[str, str]], name: str) -> list[float]:
    """Return one column of a table as numbers, without rows in which it is empty."""
    return [float(row[name]) for row in rows if row[name]]


def wait_for_end(jobs: Sequence[Job]) -> None:
    """Wait for all jobs; each has to succeed."""
    for job in jobs:
        outcome = job.wait()
        assert outcome.status == 0, outcome.log[-3000:]


def wait_for_rows(directory: Path, count: int, process: subprocess.Popen | Job) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(read_table(directory / "metrics.csv")) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_same_course(directory: Path, whole: Path) -> None:
    """Assert equal clips in every update up to the last, and losses equal up to the effects of summation order."""
    ours, theirs = read_table(directory / "metrics.csv"), read_table(whole / "metrics.csv")
    assert [[row[name] for name in CLIPS] for row in ours] == [[row[name] for name in CLIPS] for row in theirs]
    for name in ("loss/generator", "loss/semantic", "loss/discriminators", "loss/feature", "text_accuracy"):
        assert column(ours, name) == pytest.approx(column(theirs, name), rel=1e-3), name
    for name in ("progress", "callbacks"):
        assert_equal(state(directory)[name], state(whole)[name])
