"""When checkpoints are written and which of them stay: the newest, the last of every stage, the best."""

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moss_train.config.fit_schema import CheckpointConfig
from moss_train.training.callbacks.metrics import StepTimer
from moss_train.training.module import cat_module
from moss_train.utils.checkpoint import (
    CHECKPOINT_FILE,
    checkpoint_name,
    prune_checkpoints,
    read_manifest,
    read_payload,
    write_checkpoint,
)
from moss_train.utils.errors import UserError


class DirectoryCheckpointIO(CheckpointIO):
    """Lightning's plugin for checkpoints as verified directories, which are read without unpickling objects.

    Args:
        background: whether a thread writes a copy of the state, in host memory, while the training continues; one
            checkpoint at a time. An error is raised when the next checkpoint is saved, or by `finish`.
        memory_map: whether a checkpoint that is loaded is a mapping of its file, which the ranks of a machine share.
            For GPUs only: on a CPU the optimizer would keep the mapping of a file that is deleted later.
    """

    def __init__(self, background: bool = False, memory_map: bool = False) -> None:
        self.background = background
        self.memory_map = memory_map
        self._threads = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.finish()
        if self._threads is None:
            write_state(checkpoint, Path(path))
        else:
            # In a run on a GPU, tensors on the host were gathered or copied for this checkpoint.
            is_on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in checkpoint["state_dict"].values())
            self._writing = self._threads.submit(write_state, snapshot(checkpoint, is_on_gpu), Path(path))

    def finish(self) -> None:
        """Wait until the last checkpoint is safely on disk. Raises OSError when it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | None = None,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        return read_payload(Path(path), map_location=map_location or "cpu", mmap=self.memory_map)

    def remove_checkpoint(self, path: str | Path) -> None:
        raise UserError(f"{path}: checkpoints are removed by their retention, not through Lightning")


def write_state(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint directory. Raises OSError when the disk cannot store it."""

    def write(directory: Path) -> None:
        # An open file: given a path, torch hides why a write failed.
        with (directory / CHECKPOINT_FILE).open("wb") as file:
            torch.save(checkpoint, file)

    write_checkpoint(path, write, info=checkpoint["progress"])


def snapshot(state: Any, keeps_host: bool) -> Any:
    """Copy all tensors of a nested state to the host; with `keeps_host`, those that are there already are kept."""
    if isinstance(state, Tensor):
        return state.detach().clone() if state.device.type == "cpu" and not keeps_host else state.cpu()
    if isinstance(state, Mapping):
        return {key: snapshot(value, keeps_host) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value, keeps_host) for value in state)
    return state


class CheckpointWriter(Callback):
    """Saves a checkpoint at the start, every `every_updates` updates, at the end of each stage and at the end.

    It keeps the `keep_last` newest, those at the end of a stage (so that a different next stage can be tried) and, if
    set, those of every `keep_every_updates` updates (to go back to when something went wrong unnoticed).

    The checkpoint at the start shows that the disk can store one before hours are spent. The training waits until a
    checkpoint is safely on disk, unless it is written in the background; `clock` records for how long.
    """

    def __init__(self, directory: Path, settings: CheckpointConfig, clock: StepTimer) -> None:
        self.directory = directory
        self.settings = settings
        self.clock = clock
        self.saved_update: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not on_train_start, which a run without a single update never reaches.
        self.saved_update = None if trainer.ckpt_path is None else read_manifest(Path(trainer.ckpt_path))["update"]
        if self.saved_update is None:
            self.save_now(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        module = cat_module(pl_module)
        if module.update % self.settings.every_updates == 0 or module.update in module.schedule.ends:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_now(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with suppress(OSError):  # the exception that ended the training says more
            self.finish(trainer)

    def save_now(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a checkpoint and wait until it is on disk."""
        self.save(trainer, pl_module)
        self.finish(trainer)

    def finish(self, trainer: Trainer) -> None:
        """Wait until the last checkpoint is written, and remove those that are no longer kept."""
        begin = time.perf_counter()
        checkpoint_io = trainer.strategy.checkpoint_io
        if trainer.is_global_zero and isinstance(checkpoint_io, DirectoryCheckpointIO):
            checkpoint_io.finish()
            ends, archive = cat_module(trainer.lightning_module).schedule.ends, self.settings.keep_every_updates
            prune_checkpoints(
                self.directory,
                self.settings.keep_last,
                lambda update: update in ends or (archive is not None and update > 0 and update % archive == 0),
            )
        self.clock.checkpoint_seconds += time.perf_counter() - begin

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the current update unless it is saved already; all ranks take part, rank 0 writes."""
        module = cat_module(pl_module)
        update = module.update
        if update == self.saved_update:
            return
        checkpoint_io = trainer.strategy.checkpoint_io
        is_background = isinstance(checkpoint_io, DirectoryCheckpointIO) and checkpoint_io.background
        if is_background:
            self.finish(trainer)  # pruning would mistake a checkpoint that is being written for the remains of a kill
        self.saved_update, begin = update, time.perf_counter()
        path = self.directory / checkpoint_name(update)
        if trainer.is_global_zero and path.exists():
            shutil.rmtree(path)  # it is damaged: otherwise the run would have started from it
        trainer.save_checkpoint(path)
        self.clock.checkpoint_seconds += time.perf_counter() - begin
        if not is_background:
            self.finish(trainer)


def read_progress(checkpoint: Path | None) -> Mapping[str, int]:
    """Return update and stream position of a checkpoint; zeros for None."""
    return {"update": 0, "position": 0} if checkpoint is None else read_manifest(checkpoint)
