"""Does a run fit this machine? Counted before anything is allocated."""

from dataclasses import dataclass

import torch
from torch import nn

from moss_train.utils.errors import UserError
from moss_train.utils.memory import available_memory_bytes

BYTES_PER_PARAMETER = 16  # float32 weight, gradient and two AdamW moments
GIB = 2**30


@dataclass(frozen=True)
class StateSize:
    """Parameters of each network of a run; a test pins the figures of the published model."""

    tokenizer: int
    semantic: int
    discriminators: int

    @property
    def bytes(self) -> int:
        """Memory of weights, gradients and optimizer states."""
        return BYTES_PER_PARAMETER * (self.tokenizer + self.semantic + self.discriminators)


def count_parameters(module: nn.Module | None) -> int:
    """Number of parameters, 0 for None."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def check_memory(size: StateSize, accelerator: str) -> None:
    """Refuse a run whose training state cannot fit, before it is allocated.

    Raises:
        UserError: with what is needed and what is available, in GiB.
    """
    if accelerator == "cuda":
        available, where = torch.cuda.mem_get_info()[0], "GPU memory"
    else:
        available, where = available_memory_bytes(), "memory"
    if size.bytes > available:
        raise UserError(
            f"this run needs at least {size.bytes / GIB:.1f} GiB for weights, gradients and optimizer states "
            f"(tokenizer {size.tokenizer / 1e6:.1f}M, LM {size.semantic / 1e6:.1f}M, discriminators "
            f"{size.discriminators / 1e6:.1f}M parameters), {available / GIB:.1f} GiB of {where} are available: "
            "choose a smaller experiment or a larger machine"
        )
