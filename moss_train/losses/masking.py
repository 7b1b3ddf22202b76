"""Masks for clips of different lengths in one batch."""

import torch
from torch import Tensor


def zero_beyond(x: Tensor, lengths: Tensor) -> Tensor:
    """Sets what lies beyond each clip's length to zero, in value and in gradient, NaN included.

    x [B, ..., T], lengths [B] in units of the last axis -> as x.
    """
    beyond = torch.arange(x.shape[-1], device=x.device) >= lengths.to(x.device).unsqueeze(-1)
    return x.masked_fill(beyond.view(len(lengths), *[1] * (x.dim() - 2), -1), 0)
