"""On what a run was computed: `environment.json` of the run directory, one entry per start."""

import json
import os
import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moss_train.training.module import cat_module
from moss_train.utils.files import written_whole
from moss_train.utils.memory import available_memory_bytes
from moss_train.utils.paths import PACKAGE_DIRECTORY

ENVIRONMENT_FILE = "environment.json"
PACKAGES = (
    "moss_train",
    "torch",
    "torchaudio",
    "lightning",
    "transformers",
    "webdataset",
    "auraloss",
    "soundfile",
    "numpy",
)


class EnvironmentRecord(Callback):
    """Records every start of the run in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            record_start(self.directory, cat_module(pl_module).update, trainer.world_size)


def record_start(directory: Path, update: int, num_processes: int) -> None:
    """Add this start of a run to its file; an unreadable file is replaced."""
    path = directory / ENVIRONMENT_FILE
    try:
        starts = json.loads(path.read_text())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        starts = []
    start = {"update": update, "processes": num_processes, **describe()}
    with written_whole(path) as whole:
        whole.write_text(json.dumps({"starts": [*starts, start]}, indent=1) + "\n")


def describe() -> dict[str, Any]:
    """Time, command, code, versions and hardware of this process."""
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "directory": os.getcwd(),
        "git": git_commit(PACKAGE_DIRECTORY),
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}},
        "cuda": torch.version.cuda,
        "machine": platform.node(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(available_memory_bytes() / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def package_version(name: str) -> str | None:
    """Version of an installed package; None for one that is used from its folder."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_commit(directory: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds the code, and whether files differ from it; None outside of one."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changes)}


def cpu_name() -> str:
    """Model of the processor, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
