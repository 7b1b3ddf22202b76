"""What GPUs can do at most: peaks of the vendors' data sheets, by our short names and by those that drivers give."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moss_train.utils.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        bf16, tf32, fp32: peaks of dense matrix products in TFLOP/s.
        memory: in GB.
        bandwidth: of the memory, in TB/s.
        device_names: regular expression of the whole names that `torch.cuda.get_device_name` gives it.
    """

    bf16: float
    tf32: float
    fp32: float
    memory: float
    bandwidth: float
    device_names: str

    def peak(self, trainer: Mapping[str, Any]) -> tuple[float, str]:
        """Peak in FLOP/s for the precision of a run's `trainer` settings, and the name of the format."""
        if is_half(trainer):
            return self.bf16 * 1e12, "bf16"
        if trainer["matmul_precision"] == "highest":
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


def is_half(trainer: Mapping[str, Any]) -> bool:
    """Whether products are computed in 16 bits, as with `auto` on every GPU in the table."""
    return "16" in str(trainer["precision"]) or trainer["precision"] == "auto"


def gpu_of(device_name: str) -> Gpu | None:
    """The GPU of a driver's name; None for an unknown one and for a slice of one (MIG), whose peak is not its own."""
    name = device_name.strip().removeprefix("NVIDIA ")
    return next((gpu for gpu in GPUS.values() if re.fullmatch(gpu.device_names, name)), None)


def device_peak(device_name: str | None, trainer: Mapping[str, Any], given_tflops: float | None) -> float | None:
    """Peak in FLOP/s of one device of a run; None when it is not known, as that of a CPU (`device_name` None).

    Args:
        given_tflops: `logging.peak_tflops`, which goes before what is known.

    Raises:
        UserError: it is not a number above 0.
    """
    if given_tflops is not None:
        if isinstance(given_tflops, bool) or not isinstance(given_tflops, int | float) or not given_tflops > 0:
            raise UserError(f"logging.peak_tflops={given_tflops} has to be above 0, or null")
        return given_tflops * 1e12
    gpu = None if device_name is None else gpu_of(device_name)
    return None if gpu is None else gpu.peak(trainer)[0]
