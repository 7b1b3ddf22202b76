"""Preemption: on SIGTERM or SIGUSR1, finish the update, save a checkpoint and exit with 128 + signal."""

import atexit
import os
import signal
import subprocess
import warnings
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moss_train.training.distributed.collectives import gather_over_ranks
from moss_train.training.module import cat_module, update_result
from moss_train.training.run.trainer import started_processes
from moss_train.utils.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptionHandler(Callback):
    """Stops the run after the update in which SIGTERM or SIGUSR1 reached any of its processes.

    The flag is summed over ranks with the update's own numbers, so all ranks stop after the same update without another
    collective. `signal` is the signal that was received. The checkpoint is the one that every run writes at its end.

    Lightning's own signal handler runs a collective, and its loop runs a broadcast with a host synchronisation in every
    step; both are replaced.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        received = {f"signal/{number.value}": 0.0 for number in SIGNALS}

        def note(number: int, frame: FrameType | None) -> None:
            received[f"signal/{number}"] = 1.0

        cat_module(pl_module).counters.append(lambda batch: received)
        for number in SIGNALS:
            signal.signal(number, note)  # Lightning restores the old handlers at the end
        loop: Any = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):
            loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        sums = update_result(outputs).sums
        received = [number for number in SIGNALS if sums[f"signal/{number.value}"]]
        if received:
            self.signal = received[-1]
            trainer.should_stop = True


def exit_after_preemption(received: signal.Signals, update: int, trainer: Trainer) -> None:
    """Raise PreemptedError after the last checkpoint, as the signal demands; on SLURM, SIGUSR1 also requeues the job.

    A process that this run itself started returns instead: Lightning kills a run in which one of them fails.
    """
    if received == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ and trainer.is_global_zero:
        requeue()
    gather_over_ranks(None)  # a barrier until rank 0 has requeued: srun ends it as soon as another rank is gone
    if "TORCHELASTIC_RUN_ID" in os.environ:
        atexit.register(stop_torchrun)
    if trainer.local_rank == 0 or started_processes() is not None:
        raise PreemptedError(
            received, f"stopped by {received.name} at update {update}; the same command resumes from there"
        )


def stop_torchrun() -> None:
    """Tell the torchrun that started this process to end: it would restart a process that does not exit with 0."""
    parent = os.getppid()
    if parent > 1:  # otherwise torchrun is gone, and 1 is the init process
        os.kill(parent, signal.SIGTERM)


def requeue() -> None:
    """Put this SLURM job back into the queue; a failure is a warning, because the checkpoint is safe anyway."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        result = subprocess.run(["scontrol", "requeue", job], timeout=60, capture_output=True, text=True, check=False)
        problem = result.stderr.strip() if result.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        warnings.warn(f"scontrol requeue {job} failed: {problem}; submit the job again by hand", stacklevel=2)
