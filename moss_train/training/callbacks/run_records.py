"""Records of a run: its environment, startup messages, and updates that were skipped."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moss_train.batch import UpdateBatch
from moss_train.training.module import NonFiniteError, cat_module, update_result
from moss_train.training.step.update import UpdateResult
from moss_train.utils.files import PACKAGE_DIRECTORY, atomic_write, package_version, printable, read_json
from moss_train.utils.memory import available_memory_bytes


class StartupMessages(Callback):
    """Prints notices at the start of a run, on rank 0 only: for example, what the run goes without."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = tuple(lines)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(*map(printable, self.lines), sep="\n", end="\n" if self.lines else "", file=sys.stderr)


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


SKIPPED_FILE = "skipped.jsonl"


class RunRecords(Callback):
    """Records every start of the run, with its environment, and every skipped update in `directory`.

    A start is recorded with time, command, git commit, versions and hardware. A skipped update has one line per rank,
    and so has the one at which the run stops.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        path = self.directory / ENVIRONMENT_FILE
        try:
            starts = read_json(path)["starts"]
        except (OSError, ValueError, KeyError, TypeError):
            starts = []  # an unreadable file is replaced
        start = {
            "update": cat_module(pl_module).update,
            "processes": trainer.world_size,
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
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"starts": [*starts, start]}, indent=1) + "\n")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: UpdateBatch, batch_idx: int
    ) -> None:
        if update_result(outputs).not_finite:
            self._record(trainer, batch, update_result(outputs))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, NonFiniteError):
            self._record(trainer, exception.batch, exception.result)

    def _record(self, trainer: Trainer, batch: UpdateBatch, result: UpdateResult) -> None:
        entry = {
            "update": batch.update + 1,  # as in metrics.csv
            "rank": trainer.global_rank,
            "not_finite": result.not_finite,
            "next_position": batch.next_position,
            "sample_ids": [name for micro_batch in batch.micro_batches for name in micro_batch.sample_ids],
        }
        # A single appending write, because all ranks write to this file.
        with (self.directory / SKIPPED_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def git_commit(directory: Path) -> dict[str, Any] | None:
    """Return the commit of the checkout with the code and whether files differ from it; None outside a checkout."""
    command = ["git", "-C", str(directory), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    commit = next(line.rpartition(" ")[2] for line in lines if line.startswith("# branch.oid "))
    return {"commit": commit, "changed": any(not line.startswith("# ") for line in lines)}


def cpu_name() -> str:
    """Return the model of the processor, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
