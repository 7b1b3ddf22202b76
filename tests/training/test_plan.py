import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

RECIPE = Path(__file__).parents[2] / "recipes" / "cat_1b6"


def test_the_plan_is_what_its_script_computes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(RECIPE / "plan.py")])
    runpy.run_path(str(RECIPE / "plan.py"), run_name="__main__")
    assert capsys.readouterr().out == (RECIPE / "README.md").read_text()


# Like a SLURM command, but on this machine and at once, with one task.
SBATCH = """#!/usr/bin/env bash
[ "$1" = --nodes=2 ] || exit 98
shift
SLURM_JOB_ID=1 exec bash "$@"
"""
SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 99
shift
exec "$@"
"""


@pytest.mark.processes
@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sh"])
def test_its_launch_scripts_start_the_planned_run(script, tmp_path):
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SHARDS": "/data/shards",
        "NODES": "2" if script == "slurm.sh" else "1",
        "PROCESSES_PER_NODE": "1",
    }
    command = ["bash", RECIPE / script, "name=first", "--cfg", "job"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    planned = re.search(r"checkpoint\.every_updates=(\d+)", (RECIPE / "README.md").read_text())[1]
    assert config["experiment_name"] == "cat_1b6"
    assert config["name"] == "first"
    assert config["data"]["train"] == [f"/data/shards/{domain}" for domain in ("speech", "music", "sound")]
    assert config["checkpoint"]["every_updates"] == int(planned) == config["validation"]["every_updates"]
    archived = re.search(r"checkpoint\.keep_every_updates=(\d+)", (RECIPE / "README.md").read_text())[1]
    assert config["checkpoint"]["keep_every_updates"] == int(archived)
    assert config["trainer"]["reduce_dtype"] == "bf16"
    del environment["SHARDS"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "SHARDS: the folder that holds the packed sets" in done.stderr
