"""Build Lightning's Trainer for one device or one of many processes."""

import atexit
import logging
import os
import threading
import warnings
from datetime import timedelta
from typing import Any, Literal

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn

from moss_train.config.fit_schema import TrainerConfig
from moss_train.training.callbacks.checkpoint import DirectoryCheckpointIO
from moss_train.training.distributed.collectives import ManualDDPStrategy, OneProcessStrategy
from moss_train.training.distributed.fsdp import FSDP2Strategy
from moss_train.utils.errors import UserError
from moss_train.utils.workers import exit_with_parent

REDUCE_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def choose_accelerator(wanted: str) -> str:
    """Return the accelerator; `auto` is cuda if there is a GPU, else cpu. Raises UserError for cuda without a GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=cuda, but torch sees no GPU; `python -m moss_train doctor` says more")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def choose_precision(wanted: str, accelerator: str) -> Literal["32-true", "bf16-mixed"]:
    """Return Lightning's name of a precision; `auto` is bf16-mixed on a GPU with native bfloat16, else 32-true."""
    has_bf16 = accelerator == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if wanted == "bf16-mixed" or (wanted == "auto" and has_bf16) else "32-true"


def count_processes(settings: TrainerConfig, accelerator: str) -> tuple[int, int]:
    """Return the numbers of processes per machine and of machines; "auto" is what torchrun or srun started, else one
    machine with a process per GPU, or a single process on a CPU.

    Raises:
        UserError: other numbers are configured than were started, or more processes than there are GPUs.
    """
    started = started_processes()
    alone = torch.cuda.device_count() if accelerator == "cuda" else 1
    devices, nodes = (
        default if wanted == "auto" else wanted
        for wanted, default in zip((settings.devices, settings.num_nodes), started or (alone, 1), strict=True)
    )
    if started is not None and started != (devices, nodes):
        raise UserError(
            f"trainer.devices={devices} trainer.num_nodes={nodes}, but {started[0]} processes were started on each of "
            f"{started[1]} machines: leave both at auto under torchrun and srun"
        )
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise UserError(f"trainer.devices={devices}, but torch sees {torch.cuda.device_count()} GPUs here")
    return devices, nodes


def started_processes() -> tuple[int, int] | None:
    """Return the numbers of processes per machine and of machines that torchrun or srun started; None when this process
    was started alone.
    """
    if TorchElasticEnvironment.detect():
        world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return local, world // local
    if is_srun_used():
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return None


def is_srun_used() -> bool:
    """Return whether this process is a task of srun; a plain command in a batch script or an interactive allocation
    is not.
    """
    return (
        "SLURM_STEP_ID" in os.environ
        and "SLURM_PROCID" in os.environ
        and "SLURM_NTASKS" in os.environ
        and SLURMEnvironment.job_name() not in ("bash", "interactive")
    )


def build_trainer(
    settings: TrainerConfig, accelerator: str, trainer_callbacks: list[Callback], background_checkpoints: bool = False
) -> Trainer:
    """Return Lightning's Trainer for one pass over the run's loader, without its own loggers, progress bars and
    checkpoints.
    """
    devices, num_nodes = count_processes(settings, accelerator)
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
        os.environ["OMP_NUM_THREADS"] = str(settings.num_threads)  # otherwise Lightning sets it
    torch.set_float32_matmul_precision(settings.matmul_precision)
    torch.backends.cudnn.allow_tf32 = settings.matmul_precision != "highest"  # the line above leaves out convolutions
    if settings.deterministic:
        # Use algorithms that give equal results for equal inputs on one machine; an operation without one raises.
        # Otherwise attention, convolutions and indexed sums on a GPU add up in the order in which threads finish.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it is never read
        torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # first choice on an H100, but it builds a graph for every new length
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The second warning is about Lightning's own code, the third about a run without any updates left to do.
    for text in ("does not have many workers", "LeafSpec", "across ranks is zero"):
        warnings.filterwarnings("ignore", message=f".*{text}.*")
    plugins: list[Any] = [DirectoryCheckpointIO(background_checkpoints, memory_map=accelerator == "cuda")]
    if not TorchElasticEnvironment.detect():
        if is_srun_used():
            plugins.append(SLURMEnvironment(auto_requeue=False))  # Lightning's requeue would save its own checkpoint
        elif "SLURM_NTASKS" in os.environ:
            plugins.append(LightningEnvironment())  # otherwise Lightning would wait for the other tasks of the job
    is_sharded, timeout = settings.strategy == "fsdp", timedelta(seconds=settings.timeout_seconds)
    strategy: Strategy = OneProcessStrategy("cuda:0" if accelerator == "cuda" else "cpu")
    if (num_processes := devices * num_nodes) > 1:
        strategy = FSDP2Strategy(num_processes, timeout) if is_sharded else ManualDDPStrategy(timeout=timeout)
    elif is_sharded:
        rank_zero_warn("trainer.strategy=fsdp has no effect: there is one process")
    return lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=choose_precision(settings.precision, accelerator),
        max_epochs=1,
        callbacks=trainer_callbacks,
        plugins=plugins,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def start_processes(trainer: Trainer) -> None:
    """Start the run's other processes, unless torchrun or srun did, and connect all of them.

    Lightning would do so only inside `fit`, but the ranks have to agree on a checkpoint before; `fit` then finds it
    done. A process that this one starts ends when this one is killed.
    """
    strategy: Any = trainer.strategy
    if trainer.local_rank > 0 and started_processes() is None:
        threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    if strategy.launcher is not None:
        strategy.launcher.launch(lambda: None)
    if TorchElasticEnvironment.detect() and trainer.world_size > 1:
        # A prefix per attempt: torchrun may use one store for all attempts of the group, and without a prefix a process
        # that is faster than rank 0 would read the address that the dead rank 0 of an earlier attempt left there. Each
        # machine counts its own attempts, so several machines need a store per attempt
        # (`TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`, as in recipes/torchrun).
        device = strategy.root_device
        rank, world_size, timeout = strategy.global_rank, strategy.world_size, strategy._timeout
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        atexit.register(_disconnect)
    strategy.setup_environment()


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
