"""Rotary position embedding with interleaved pairs (RoFormer, arXiv 2104.09864)."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Angles of frames: cosine and sine [B, T, 1, D / 2] float32 (B may be 1), and both as one complex number.

    A complex product is one pass over the data, the real form is seven; compilers take the real one, and MPS, which has
    no `phase`.
    """

    cosine: Tensor
    sine: Tensor
    phase: Tensor | None


def rotation(positions: Tensor, head_dim: int, max_period: float) -> Rotation:
    """The rotation of every position [B, T] int64 (B may be 1), computed where it is used.

    There is no buffer: transformers builds models on the meta device and brings non-persistent buffers back as
    garbage. Angles are formed in float64, so a stream may run for years; in float32 they err by 0.006 rad after an
    hour at 100 Hz. (Apple's MPS has no float64 and keeps that limit.)
    """
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    angles = positions.to(dtype)[:, :, None, None] * max_period**-exponent
    cosine, sine = torch.cos(angles).float(), torch.sin(angles).float()
    return Rotation(cosine, sine, None if positions.device.type == "mps" else torch.complex(cosine, sine))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair (x[2i], x[2i + 1]) of [B, T, H, D] by its angle, in float32, in the dtype of `x` again."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if rotation.phase is not None and not torch.compiler.is_compiling():
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * rotation.phase)
    else:
        even, odd = pairs.unbind(-1)
        cosine, sine = rotation.cosine, rotation.sine
        rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def rotate_in_place(x: Tensor, rotation: Rotation) -> None:
    """`rotate` that overwrites `x`."""
    if rotation.phase is None or x.dtype != torch.float32 or torch.compiler.is_compiling():
        x.copy_(rotate(x, rotation))
    else:
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(rotation.phase)
