"""Long runs need no more resources than short ones: memory, threads and open files of every process stay constant."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from .harness import SCALE, Fit, Job

pytestmark = [pytest.mark.faults, pytest.mark.slow]

UPDATES = 100 if SCALE == 1 else 200 * SCALE
WARM = UPDATES // 4
LAST = UPDATES - 5
LATE_KB, GROWTH_KB = 3072, 1024
"""What something used for the first time may take, and what may come for every hundred updates."""


@dataclass(frozen=True)
class Holdings:
    """The resources of one process."""

    resident_kb: int
    threads: int
    files: int


def holdings(pid: int) -> Holdings:
    """Return a process's resources, as reported by the kernel."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Holdings(int(status["VmRSS"].split()[0]), int(status["Threads"]), files)


def children(pid: int) -> list[int]:
    """Return the processes that a process started, such as its data workers."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def holdings_at(fit: Fit, job: Job, update: int) -> dict[int, Holdings]:
    """Wait for an update and return the resources of the process and its workers."""
    metrics = fit.directory / "metrics.csv"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") <= update:
        assert job.poll() is None, job.wait().log[-3000:]
        time.sleep(0.05)
    return {pid: holdings(pid) for pid in (job.pid, *children(job.pid))}


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_nothing_grows_with_the_updates(make_fit, packed: Path) -> None:
    """Both stages, workers, frequent checkpoints, validation and samples; nightly with 2,000 updates."""
    often = "every_updates: 20, max_clips: 1, samples_every_updates: 20, samples_clips: 1"
    fit = make_fit(
        "long",
        "data.num_workers=2",
        "stages.0.updates=10",
        f"stages.1.updates={UPDATES - 10}",
        f"validation={{data: {packed}, {often}}}",
    )
    job = fit.start()
    before, after = holdings_at(fit, job, WARM), holdings_at(fit, job, LAST)
    assert job.wait(3600).status == 0
    assert len(before) == 3
    assert before.keys() == after.keys()
    for pid, first in before.items():
        growth = after[pid].resident_kb - first.resident_kb
        print(f"updates {WARM} to {LAST}: {growth} kB more; {first}, {after[pid]}")
        assert growth <= LATE_KB + GROWTH_KB * (LAST - WARM) / 100
        assert after[pid].threads == first.threads
        assert after[pid].files < first.files + len(list(packed.glob("**/*.tar")))  # a worker keeps the shards open
