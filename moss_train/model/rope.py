"""Rotary position embedding with interleaved pairs (RoFormer, arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotation(positions: Tensor, head_dim: int, max_period: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, computed where they are used.

    There is no buffer: transformers builds models on the meta device and brings non-persistent buffers back as
    garbage. Angles are formed in float64, so a stream may run for years; in float32 they err by 0.006 rad after an
    hour at 100 Hz. (Apple's MPS has no float64 and keeps that limit.)

    Args:
        positions: [B, T] int64 absolute frame numbers (B may be 1).

    Returns:
        cosine, sine: [B, T, 1, head_dim / 2] float32.
    """
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    angles = positions.to(dtype)[:, :, None, None] * max_period**-exponent
    return torch.cos(angles).float(), torch.sin(angles).float()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate each pair (x[2i], x[2i + 1]) of [B, T, H, D] by its angle, in float32, in the dtype of `x` again."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if pairs.device.type == "cpu" and not torch.compiler.is_compiling():
        # One pass over the data instead of seven.
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cosine, sine))
    else:
        even, odd = pairs.unbind(-1)
        rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return rotated.flatten(-2).to(x.dtype)
