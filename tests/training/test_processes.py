"""Runs of two processes from the command line, started by Lightning, torchrun and srun; killed, and told to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moss_train.config.fit_schema import TrainerConfig
from moss_train.training.loggers.base import column, read_table
from moss_train.training.run.trainer import count_processes
from moss_train.utils.checkpoint import list_checkpoints, read_manifest
from moss_train.utils.errors import UserError

from .runs import FIT, assert_equal, assert_same_course, state, values, wait_for_rows

pytestmark = pytest.mark.processes

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = sorted([*RECIPES.rglob("*.sh"), *RECIPES.rglob("*.sbatch")])
ENDLESS = ["stages.0.updates=100000", "checkpoint.every_updates=1000"]
STEP = {"SLURM_STEP_ID": "0"}  # srun's
TORCHRUN = ("bash", str(RECIPES / "torchrun" / "run.sh"))


def children(process: subprocess.Popen) -> list[int]:
    return children_of(process.pid)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def pair(small_overrides, tmp_path_factory) -> Path:
    """The small recipe by two processes."""
    directory = tmp_path_factory.mktemp("runs") / "pair"
    command = [sys.executable, *FIT, *small_overrides, f"run_dir={directory}", "trainer.devices=2"]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("finished at update 8 of 8") == 1
    return directory


def test_two_processes_train_like_one(pair, whole):
    assert_same_course(pair, whole)


def test_a_killed_run_goes_on_with_another_number_of_processes(start, whole, tmp_path):
    """SIGKILL of the first of two processes ends the other; one process goes on, and then two again."""
    directory = tmp_path / "run"
    process = start(directory, "trainer.devices=2")
    wait_for_rows(directory, 3, process)
    (other,) = children(process)
    process.kill()
    process.wait()
    wait_until_gone(other)
    assert start(directory, "max_updates=6").wait(timeout=240) == 0
    assert start(directory, "trainer.devices=2").wait(timeout=240) == 0
    assert_same_course(directory, whole)


def test_a_killed_process_ends_the_run_with_an_error(start, tmp_path):
    process = start(tmp_path / "run", "trainer.devices=2", *ENDLESS)
    wait_for_rows(tmp_path / "run", 1, process)
    os.kill(children(process)[0], signal.SIGKILL)
    assert process.wait(timeout=60) not in (0, None)


def test_the_torchrun_recipe_starts_a_group_again_when_one_process_dies(start, pair, tmp_path):
    directory = tmp_path / "run"
    settings = {"PYTHON": sys.executable, "PROCESSES_PER_NODE": "2", "MAX_RESTARTS": "1"}
    process = start(directory, launcher=TORCHRUN, **settings)
    wait_for_rows(directory, 3, process)
    os.kill(children(process)[1], signal.SIGKILL)
    assert process.wait(timeout=300) == 0
    assert values(directory) == values(pair)
    assert_equal(state(directory), state(pair))


@pytest.mark.nightly
def test_several_machines_connect_again_when_a_process_of_one_dies(start, pair, tmp_path):
    """Two torchruns that know of each other by address only, each with one process."""
    directory = tmp_path / "run"
    address = f"127.0.0.1:{31500 + os.getpid() % 2000}"
    settings = {"PYTHON": sys.executable, "PROCESSES_PER_NODE": "1", "NODES": "2", "RENDEZVOUS": address}
    agents = [start(directory, "trainer.timeout_seconds=60", launcher=TORCHRUN, **settings) for _ in range(2)]
    wait_for_rows(directory, 3, agents[0])
    os.kill(children(agents[1])[0], signal.SIGKILL)
    assert [agent.wait(timeout=300) for agent in agents] == [0, 0]
    assert values(directory) == values(pair)
    assert_equal(state(directory), state(pair))


def test_torchrun_does_not_start_again_what_was_told_to_stop(start, tmp_path):
    directory = tmp_path / "run"
    settings = {"PYTHON": sys.executable, "PROCESSES_PER_NODE": "2"}
    process = start(directory, *ENDLESS, launcher=TORCHRUN, **settings)
    wait_for_rows(directory, 2, process)
    os.kill(children(process)[1], signal.SIGTERM)
    assert process.wait(timeout=120) != 0
    last = int(read_table(directory / "metrics.csv")[-1]["update"])
    checkpoint = list_checkpoints(directory / "checkpoints")[-1]
    assert read_manifest(checkpoint)["update"] == last


def test_sigterm_to_any_process_ends_all_after_a_checkpoint(start, tmp_path):
    directory = tmp_path / "run"
    process = start(directory, "trainer.devices=2", *ENDLESS)
    wait_for_rows(directory, 2, process)
    os.kill(children(process)[0], signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    last = int(read_table(directory / "metrics.csv")[-1]["update"])
    assert read_manifest(list_checkpoints(directory / "checkpoints")[-1])["update"] == last >= 2


def test_several_machines_need_a_rendezvous(tmp_path):
    script = RECIPES / "torchrun" / "run.sh"
    done = subprocess.run(["bash", script], env={**os.environ, "NODES": "2"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "run.sh: NODES=2 needs RENDEZVOUS=<host of one of the machines>:29400\n"


SRUN = """#!/usr/bin/env bash
# As srun on one machine: so many tasks, each with its number; the first that fails ends the others.
[ "$1" = --kill-on-bad-exit=1 ] || exit 99
[ "$SRUN_CPUS_PER_TASK" = "$SLURM_CPUS_PER_TASK" ] || exit 98
shift
for ((task = 0; task < SLURM_NTASKS; task++)); do SLURM_STEP_ID=0 SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & done
for task in $(jobs -p); do
    wait -n
    status=$?
    [ "$status" -eq 0 ] || { kill -KILL $(jobs -p) 2>/dev/null; exit "$status"; }
done
"""


def cluster(folder: Path) -> dict[str, str]:
    """The variables of a SLURM job of two tasks; on its PATH an srun, and an scontrol that writes down its calls."""
    (folder / "bin").mkdir()
    # Slow, so that a task that does not wait for the first one ends it before the job is requeued.
    scripts = {"srun": SRUN, "scontrol": f'#!/bin/sh\nsleep 2\necho "$@" >> {folder / "calls"}\n'}
    for name, text in scripts.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29500 + os.getpid() % 2000),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_CPUS_PER_TASK": "2",
    }


def test_the_slurm_recipe_requeues_its_job_once_and_goes_on(start, tmp_path):
    """The signal that comes before the time limit, to one task and to the data workers of the other; the job again."""
    directory, job = tmp_path / "run", cluster(tmp_path)
    batch = ("bash", str(RECIPES / "slurm" / "train.sbatch"))
    overrides = ("data.num_workers=1", *ENDLESS)
    process = start(directory, *overrides, launcher=batch, **job)
    wait_for_rows(directory, 2, process)
    first, second = children(process)
    for pid in [second, *children_of(first)]:
        os.kill(pid, signal.SIGUSR1)
    assert process.wait(timeout=120) == 138
    assert (tmp_path / "calls").read_text() == "requeue 4711\n"
    last = int(read_table(directory / "metrics.csv")[-1]["update"])
    assert read_manifest(list_checkpoints(directory / "checkpoints")[-1])["update"] == last
    again = start(directory, *overrides, f"max_updates={last + 1}", launcher=batch, **job)
    assert again.wait(timeout=120) == 0
    assert column(read_table(directory / "metrics.csv"), "update") == [*range(1, last + 2)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_is_a_script_that_bash_reads(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("environment", "settings", "expected"),
    [
        ({}, {}, (1, 1)),
        ({}, {"devices": 3, "num_nodes": 2}, (3, 2)),
        ({**STEP, "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "j"}, {}, (4, 2)),
        ({**STEP, "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "bash"}, {}, (1, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "j"}, {}, (1, 1)),  # in the batch script itself
    ],
)
def test_processes_are_those_that_were_started_or_asked_for(monkeypatch, environment, settings, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert count_processes(TrainerConfig(**settings), "cpu") == expected


def test_another_number_than_srun_started_is_refused(monkeypatch):
    for name, value in {**STEP, "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"trainer\.devices=2 .*4 processes were started on each of 2 machines"):
        count_processes(TrainerConfig(devices=2), "cpu")
