"""Does a run fit this machine? Counted before anything is allocated."""

from dataclasses import dataclass

import torch
from torch import nn

from moss_train.utils.errors import UserError
from moss_train.utils.memory import available_memory_bytes

BYTES_PER_PARAMETER = 16  # float32 weight, gradient and two AdamW moments
AVERAGE_BYTES = 4  # per parameter of the tokenizer, of its moving average in float32
GIB = 2**30


@dataclass(frozen=True)
class StateSize:
    """Parameters of each network of a run; a test pins the figures of the published model.

    Attributes:
        has_average: whether a moving average of the tokenizer is kept.
        shards: ranks that share tokenizer and text LM (FSDP).
    """

    tokenizer: int
    semantic: int
    discriminators: int
    has_average: bool = False
    shards: int = 1

    @property
    def bytes(self) -> int:
        """Memory of weights, gradients, optimizer states and moving average in one process."""
        average = AVERAGE_BYTES * self.tokenizer if self.has_average else 0
        shared = BYTES_PER_PARAMETER * (self.tokenizer + self.semantic) + average
        return -(-shared // self.shards) + BYTES_PER_PARAMETER * self.discriminators


def count_parameters(module: nn.Module | None) -> int:
    """Number of parameters, 0 for None."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def check_memory(size: StateSize, device: torch.device, processes: int = 1) -> None:
    """Refuse a run whose training state cannot fit, before it is allocated.

    Args:
        device: of this process; no other GPU is touched, which would cost memory on it.
        processes: on this machine. On CPUs they share its memory, each with a state of its own; each GPU holds one.

    Raises:
        UserError: with what is needed and what is available, in GiB.
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
