"""Memory that a run needs, and what machines have: peaks of GPUs from the vendors' data sheets, and memory.

GPUs are found by our short names and by those of their drivers. Memory is checked before anything is allocated.
"""

import math
import re
from dataclasses import dataclass, replace

import torch

from moss_train.config.fit_schema import TrainerConfig
from moss_train.utils.errors import UserError
from moss_train.utils.memory import available_memory_bytes


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        bf16, tf32, fp32: peaks of dense matrix products in TFLOP/s.
        memory: memory size in GB.
        bandwidth: memory bandwidth in TB/s.
        device_names: regular expression that matches its whole name in `torch.cuda.get_device_name`, without "NVIDIA".
    """

    bf16: float
    tf32: float
    fp32: float
    memory: float
    bandwidth: float
    device_names: str

    def peak(self, trainer: TrainerConfig) -> tuple[float, str]:
        """Return the peak in FLOP/s for the precision of a run's `trainer` settings, and the name of the format."""
        if is_half(trainer):
            return self.bf16 * 1e12, "bf16"
        if trainer.matmul_precision == "highest":
            return self.fp32 * 1e12, "fp32"
        return self.tf32 * 1e12, "tf32"


GPUS = {
    "h100": Gpu(989.4, 494.7, 66.9, 80, 3.35, "H100 80GB HBM3"),  # SXM5
    "h100_pcie": Gpu(756.0, 378.0, 51.2, 80, 2.0, "H100 PCIe"),
    "h100_nvl": Gpu(835.0, 417.5, 60.0, 94, 3.9, "H100 NVL"),
    "h200": Gpu(989.4, 494.7, 66.9, 141, 4.8, "H200"),  # SXM5
    "h200_nvl": Gpu(835.0, 417.5, 60.0, 141, 4.8, "H200 NVL"),
    "b200": Gpu(2250.0, 1125.0, 75.0, 180, 7.7, "B200"),  # HGX
    "a100": Gpu(311.9, 156.0, 19.5, 80, 2.04, "A100-SXM4-80GB|A100 80GB PCIe"),
    "a100_40gb": Gpu(311.9, 156.0, 19.5, 40, 1.56, "A100-SXM4-40GB|A100-PCIE-40GB"),
    "l40s": Gpu(362.0, 183.0, 91.6, 48, 0.86, "L40S"),
    "rtx4090": Gpu(165.2, 82.6, 82.6, 24, 1.01, "GeForce RTX 4090"),
}


def is_half(trainer: TrainerConfig) -> bool:
    """Return whether products are computed in 16 bits, as with `auto` on every GPU in the table."""
    return trainer.precision in ("bf16-mixed", "auto")


def gpu_of(device_name: str) -> Gpu | None:
    """Return the GPU with a driver's name; None for an unknown one and for a slice of a GPU (MIG), which does not have
    the GPU's peak.
    """
    name = device_name.strip().removeprefix("NVIDIA ")
    return next((gpu for gpu in GPUS.values() if re.fullmatch(gpu.device_names, name)), None)


def device_peak(device_name: str | None, trainer: TrainerConfig, given_tflops: float | None) -> float | None:
    """Return the peak in FLOP/s of one device of a run; None when it is not known, as for a CPU (`device_name` is
    None).

    Args:
        given_tflops: `logging.peak_tflops`, which takes precedence over the table.
    """
    if given_tflops is not None:
        return given_tflops * 1e12
    gpu = None if device_name is None else gpu_of(device_name)
    return None if gpu is None else gpu.peak(trainer)[0]


GIB = 2**30


@dataclass(frozen=True)
class StateSize:
    """Number of parameters of each network of a run; a test pins the figures of the published model.

    Attributes:
        has_average: whether a moving average of the tokenizer is kept.
        shards: number of ranks over which tokenizer and text LM are sharded (FSDP).
    """

    tokenizer: int
    semantic: int
    discriminators: int
    has_average: bool = False
    shards: int = 1

    @property
    def kinds(self) -> dict[str, float]:
        """Bytes of the training state in one process by kind; all of it is float32."""
        held = (self.tokenizer + self.semantic) / self.shards + self.discriminators
        kinds = {"weights": 4 * held, "gradients": 4 * held, "AdamW moments": 8 * held}
        return kinds | ({"moving average": 4 * self.tokenizer / self.shards} if self.has_average else {})

    @property
    def bytes(self) -> int:
        """Memory of the training state in one process."""
        return math.ceil(sum(self.kinds.values()))

    @property
    def checkpoint_bytes(self) -> float:
        """Size of a checkpoint, which holds everything but gradients."""
        kinds = replace(self, shards=1).kinds
        return sum(kinds.values()) - kinds["gradients"]


def check_memory(size: StateSize, device: torch.device, processes: int = 1) -> None:
    """Refuse a run whose training state cannot fit, before it is allocated.

    Args:
        device: device of this process; no other GPU is used, which would take memory there.
        processes: number of processes on this machine. On CPUs they share its memory, each with a state of its own;
            each GPU holds one state.

    Raises:
        UserError: the state does not fit; the message has the needed and the available memory in GiB.
    """
    if device.type == "cuda":
        available, where, copies = torch.cuda.mem_get_info(device)[0], "GPU memory", 1
    else:
        available, where, copies = available_memory_bytes(), "memory", processes
    needed = size.bytes * copies
    if needed > available:
        kinds = "weights, gradients, optimizer states" + (" and moving average" if size.has_average else "")
        each = f" of {copies} processes" if copies > 1 else ""
        raise UserError(
            f"this run needs at least {needed / GIB:.1f} GiB for {kinds}{each} "
            f"(tokenizer {size.tokenizer / 1e6:.1f}M, LM {size.semantic / 1e6:.1f}M, discriminators "
            f"{size.discriminators / 1e6:.1f}M parameters), {available / GIB:.1f} GiB of {where} are available: "
            "choose a smaller experiment or a larger machine"
        )
