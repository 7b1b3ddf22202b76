"""Convert waveforms in any container to tensors, pad them, and measure and set their level."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_GAIN_DB = 40.0  # more would only raise the noise of a nearly silent clip


def as_tensor(values: Any, name: str) -> Tensor:
    """Convert a tensor, an array, or nested sequences of numbers, arrays or tensors of equal shape to a tensor.

    Raises:
        ValueError: anything else, or parts of different shapes; the message calls them `name`.
    """
    if isinstance(values, Tensor):
        return values
    if isinstance(values, list | tuple) and values and not isinstance(values[0], int | float):
        parts = [as_tensor(value, name) for value in values]
        if any(part.shape != parts[0].shape for part in parts):
            shapes = ", ".join(str(tuple(part.shape)) for part in parts[:5])
            raise ValueError(
                f"{name} have different shapes ({shapes}): use batch_encode or batch_decode, or the feature extractor"
            )
        return torch.stack(parts)
    try:
        return torch.tensor(values)  # copies: the memory of an array that may be read-only is not shared
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be a tensor, an array or lists of numbers, got {type(values).__name__}"
        ) from error


def check_floating(audio: Tensor) -> None:
    """Raise ValueError unless samples are floating-point numbers."""
    if not audio.is_floating_point():
        kind = str(audio.dtype).removeprefix("torch.")
        raise ValueError(f"expected floating-point audio in -1..1, got {kind} (divide 16-bit samples by 32768)")


def pad_together(clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack tensors [X, T] of different T into [B, X, T], zero-padded at the end, and a mask [B, T] of valid steps."""
    if not clips or any(clip.ndim != 2 or clip.shape[0] != clips[0].shape[0] for clip in clips):
        raise ValueError(f"expected tensors [X, T] that differ in T only, got {[tuple(clip.shape) for clip in clips]}")
    longest = max(clip.shape[1] for clip in clips)
    lengths = torch.tensor([clip.shape[1] for clip in clips], device=clips[0].device)
    padded = torch.stack([F.pad(clip, (0, longest - clip.shape[1])) for clip in clips])
    return padded, torch.arange(longest, device=lengths.device) < lengths[:, None]


def silence_beyond(audio: Tensor, lengths: Tensor | None) -> Tensor:
    """Return audio [B, C, T] with zeros beyond the first `lengths` [B] samples of each item, None for all."""
    if lengths is None:
        return audio
    return audio.masked_fill((torch.arange(audio.shape[2], device=audio.device) >= lengths[:, None])[:, None], 0)


def level_db(audio: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return the RMS level [B] of audio [B, C, T] in dB relative to full scale; -inf for silence.

    Args:
        lengths: [B] valid samples of each item, None for all.
    """
    count = torch.full(audio.shape[:1], audio.shape[2], device=audio.device) if lengths is None else lengths
    energy = silence_beyond(audio.float(), lengths).square().sum(dim=(1, 2))
    return 10 * torch.log10(energy / (count.clamp(min=1) * audio.shape[1]))


def set_level(audio: Tensor, level: float, lengths: Tensor | None = None) -> Tensor:
    """Scale every item of audio [B, C, T] to an RMS level in dB relative to full scale.

    The gain is at most 40 dB and never lifts a peak above full scale; silence stays silent.

    Raises:
        ValueError: a level outside of -100 to 0 dB.
    """
    if not -100 <= level <= 0:
        raise ValueError(f"loudness is a level in dB relative to full scale, from -100 to 0, got {level}")
    if not audio.numel():
        return audio
    gain_db = (level - level_db(audio, lengths)).clamp(max=LARGEST_GAIN_DB)
    gain = 10 ** (gain_db / 20)
    peak = silence_beyond(audio.float(), lengths).abs().amax(dim=(1, 2))
    gain = torch.minimum(gain, (1 / peak).clamp(min=1))
    gain = torch.where(peak > 0, gain, torch.ones_like(gain))
    return audio * gain.to(audio.dtype)[:, None, None]
