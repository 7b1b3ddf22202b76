"""Checks of what users hand to the model, each a ValueError with the offending value."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_moss_audio_tokenizer import MossAudioTokenizerConfig


def check_audio(config: MossAudioTokenizerConfig, audio: Tensor) -> Tensor:
    """Bring [B, T] (mono) or [B, C, T] floating-point samples to [B, C, T]."""
    channels = config.number_channels
    if not audio.is_floating_point():
        raise ValueError(f"expected floating-point audio in -1..1, got {str(audio.dtype).removeprefix('torch.')}")
    if audio.ndim == 2 and channels == 1:
        audio = audio[:, None]
    if audio.ndim != 3 or audio.shape[1] != channels:
        raise ValueError(f"expected audio [B, {channels}, T], got shape {tuple(audio.shape)}")
    return audio


def valid_lengths(mask: Tensor | None, batch: int, longest: int, device: torch.device) -> Tensor:
    """[B] how many of `longest` samples or frames of each item are real, from a mask [B, longest]."""
    if mask is None:
        return torch.full((batch,), longest, device=device)
    mask = mask.to(device, torch.bool)
    if mask.ndim == 3 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.shape != (batch, longest):
        raise ValueError(f"padding_mask must have shape {(batch, longest)}, got {tuple(mask.shape)}")
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("padding_mask must be true for the first samples of each item and false for the padding after")
    return mask.sum(dim=-1)


def check_codes(config: MossAudioTokenizerConfig, codes: Tensor) -> None:
    """Refuse all but integer codes [n, B, frames] of this model.

    Values on an accelerator are taken as they are: looking at them would make the host wait for the device.
    """
    levels, size = config.num_quantizers, config.quantizer_kwargs["codebook_size"]
    if codes.ndim != 3 or not 1 <= codes.shape[0] <= levels or codes.is_floating_point():
        raise ValueError(f"expected integer codes [1..{levels}, B, frames], got {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() and codes.device.type == "cpu" and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise ValueError(f"codes must lie in 0..{size - 1}, got {int(codes.min())}..{int(codes.max())}")


def chunk_frames(config: MossAudioTokenizerConfig, chunk_duration: float | None) -> int | None:
    """Frames per chunk of so many seconds; None stays None."""
    if chunk_duration is None:
        return None
    longest = config.causal_transformer_context_duration
    frames = chunk_duration * config.frame_rate
    if not 0 < chunk_duration <= longest:
        raise ValueError(f"chunk_duration must be above 0 and at most {longest} s, got {chunk_duration}")
    if round(frames) < 1 or not math.isclose(frames, round(frames), rel_tol=0, abs_tol=1e-6):
        raise ValueError(
            f"chunk_duration must be a whole number of frames of {1 / config.frame_rate:g} s, got {chunk_duration}"
        )
    return round(frames)


def pad_together(clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tensors [X, T] of different T as one [B, X, T] with zeros behind, and a mask [B, T] of what is real."""
    if not clips or any(clip.ndim != 2 or clip.shape[0] != clips[0].shape[0] for clip in clips):
        raise ValueError(f"expected tensors [X, T] that differ in T only, got {[tuple(clip.shape) for clip in clips]}")
    longest = max(clip.shape[1] for clip in clips)
    lengths = torch.tensor([clip.shape[1] for clip in clips], device=clips[0].device)
    padded = torch.stack([F.pad(clip, (0, longest - clip.shape[1])) for clip in clips])
    return padded, torch.arange(longest, device=lengths.device) < lengths[:, None]
