"""Runs of two processes that are killed or asked to stop.

Most are forked from one prepared process with the variables that torchrun or srun sets. The launchers themselves and
Lightning's own start of further processes are each run once, the longer ones nightly.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moss_train.config.fit_schema import TrainerConfig
from moss_train.training.loggers.base import read_table
from moss_train.training.run.trainer import count_processes
from moss_train.utils.checkpoint import list_checkpoints, read_manifest
from moss_train.utils.errors import UserError

from ..faults.harness import Job, Launcher, assert_same_run
from .runs import assert_same_course, column, wait_for_end, wait_for_rows

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = sorted([*RECIPES.rglob("*.sh"), *RECIPES.rglob("*.sbatch")])
ENDLESS = ["stages.0.updates=100000", "checkpoint.every_updates=1000"]
STEP = {"SLURM_STEP_ID": "0"}  # srun's
TORCHRUN = ("bash", str(RECIPES / "torchrun" / "run.sh"))


def children(process: subprocess.Popen) -> list[int]:
    return children_of(process.pid)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def pair(launcher: Launcher, small_overrides, tmp_path_factory) -> Path:
    """Run the small recipe with two processes."""
    directory = tmp_path_factory.mktemp("runs") / "pair"
    ranks = launcher.start_ranks("fit", *small_overrides, f"run_dir={directory}")
    wait_for_end(ranks)
    assert [job.log.read_text().count("finished at update 8 of 8") for job in ranks] == [1, 0]
    return directory


def test_two_processes_train_like_one(pair, whole):
    assert_same_course(pair, whole)


def test_a_killed_run_goes_on_with_another_number_of_processes(launcher, small_overrides, whole, tmp_path):
    """SIGKILL of the first of two processes ends the other; one process continues the run, and then two again."""
    directory = tmp_path / "run"
    arguments = ("fit", *small_overrides, f"run_dir={directory}")
    first, second = launcher.start_ranks(*arguments)
    wait_for_rows(directory, 3, first)
    first.send(signal.SIGKILL)
    assert second.wait().status != 0
    wait_for_end([launcher.start(*arguments, "max_updates=6")])
    wait_for_end(launcher.start_ranks(*arguments))
    assert_same_course(directory, whole)


@pytest.mark.nightly
def test_a_killed_process_ends_the_run_with_an_error(start, tmp_path):
    process = start(tmp_path / "run", "trainer.devices=2", *ENDLESS)
    wait_for_rows(tmp_path / "run", 1, process)
    os.kill(children(process)[0], signal.SIGKILL)
    assert process.wait(timeout=60) not in (0, None)


@pytest.mark.nightly
def test_the_torchrun_recipe_starts_a_group_again_when_one_process_dies(start, pair, tmp_path):
    directory = tmp_path / "run"
    settings = {"PYTHON": sys.executable, "PROCESSES_PER_NODE": "2", "MAX_RESTARTS": "1"}
    process = start(directory, launcher=TORCHRUN, **settings)
    wait_for_rows(directory, 3, process)
    os.kill(children(process)[1], signal.SIGKILL)
    assert process.wait(timeout=300) == 0
    assert_same_run(directory, pair)


@pytest.mark.nightly
def test_several_machines_connect_again_when_a_process_of_one_dies(start, pair, tmp_path):
    """Two torchruns that are connected only by an address, each with one process."""
    directory = tmp_path / "run"
    address = f"127.0.0.1:{31500 + os.getpid() % 2000}"
    settings = {"PYTHON": sys.executable, "PROCESSES_PER_NODE": "1", "NODES": "2", "RENDEZVOUS": address}
    agents = [start(directory, "trainer.timeout_seconds=60", launcher=TORCHRUN, **settings) for _ in range(2)]
    wait_for_rows(directory, 3, agents[0])
    os.kill(children(agents[1])[0], signal.SIGKILL)
    assert [agent.wait(timeout=300) for agent in agents] == [0, 0]
    assert_same_run(directory, pair)


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


def start_tasks(launcher: Launcher, variables: dict[str, str], *arguments: str) -> list[Job]:
    """Start the tasks of a job step as srun does."""
    return [
        launcher.start(*arguments, environment={**variables, **STEP, "SLURM_PROCID": task, "SLURM_LOCALID": task})
        for task in ("0", "1")
    ]


def cluster(folder: Path) -> dict[str, str]:
    """Return the variables of a SLURM job with two tasks; PATH has an srun and an scontrol that records its calls."""
    (folder / "bin").mkdir()
    # Slow, so that a task that does not wait for the first one would end it before the job is requeued.
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


def test_a_slurm_job_is_requeued_once_and_goes_on(launcher, small_overrides, tmp_path):
    """One task and the other's data workers get the signal before the time limit; then the job runs again."""
    directory, job = tmp_path / "run", cluster(tmp_path)
    arguments = ("fit", *small_overrides, f"run_dir={directory}", "data.num_workers=1", *ENDLESS)
    first, second = start_tasks(launcher, job, *arguments)
    wait_for_rows(directory, 2, first)
    for pid in [second.pid, *children_of(first.pid)]:
        os.kill(pid, signal.SIGUSR1)
    assert [task.wait().status for task in (first, second)] == [138, 138]
    assert (tmp_path / "calls").read_text() == "requeue 4711\n"
    last = int(read_table(directory / "metrics.csv")[-1]["update"])
    assert read_manifest(list_checkpoints(directory / "checkpoints")[-1])["update"] == last
    wait_for_end(start_tasks(launcher, job, *arguments, f"max_updates={last + 1}"))
    assert column(read_table(directory / "metrics.csv"), "update") == [*range(1, last + 2)]


@pytest.mark.nightly
def test_the_slurm_recipe_starts_the_tasks_of_its_job(start, tmp_path):
    directory, job = tmp_path / "run", cluster(tmp_path)
    batch = ("bash", str(RECIPES / "slurm" / "train.sbatch"))
    process = start(directory, *ENDLESS, launcher=batch, **job)
    wait_for_rows(directory, 2, process)
    os.kill(children(process)[1], signal.SIGUSR1)
    assert process.wait(timeout=120) == 138
    assert (tmp_path / "calls").read_text() == "requeue 4711\n"


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
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "j"}, {}, (1, 1)),  # in the batch script
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
