"""Bring what users hand to the model to tensors and check it; every refusal is a ValueError with the value.

Waveforms of any container become tensors, are padded together, and their level is measured and set. Values are looked
at on the CPU only: elsewhere the host would have to wait for the device, and a compiler or an exporter would have to
break its graph.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_moss_audio_tokenizer import MossAudioTokenizerConfig

LARGEST_PEAK = 10.0  # of a waveform in -1..1 with some overshoot; 16-bit numbers are far beyond


def can_read(values: Tensor) -> bool:
    """Return whether the host may look at values without waiting for a device or breaking a graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def check_audio(config: MossAudioTokenizerConfig, values: Any) -> Tensor:
    """Bring floating-point samples to a tensor [B, C, T].

    Args:
        values: tensor, array or lists: [B, C, T]; [B, T] or [T] for one channel; [C, T] for several.
    """
    audio, channels = as_tensor(values, "waveforms"), config.number_channels
    if not audio.is_floating_point():
        kind = str(audio.dtype).removeprefix("torch.")
        raise ValueError(f"expected floating-point audio in -1..1, got {kind} (divide 16-bit samples by 32768)")
    if channels == 1 and audio.ndim == 1:
        return audio[None, None]
    if channels == 1 and audio.ndim == 2:
        return audio[:, None]
    if audio.ndim == 2 and audio.shape[0] == channels:
        return audio[None]
    if audio.ndim != 3 or audio.shape[1] != channels:
        raise ValueError(f"expected audio [B, {channels}, T], got shape {tuple(audio.shape)}")
    return audio


def check_samples(config: MossAudioTokenizerConfig, audio: Tensor, lengths: Tensor, warned: set[str]) -> None:
    """Refuse samples that are not finite; warn once of audio far beyond full scale.

    Args:
        audio: [B, C, T].
        lengths: [B] samples of each item that count.
        warned: kinds of warnings that this model gave; extended here.
    """
    if not can_read(audio) or not audio.numel():
        return
    audio = audio.detach()
    # NaN passes through the maximum: one pass over the samples is enough where all is well.
    if float(audio.abs().amax()) <= LARGEST_PEAK:
        return
    audio = audio.masked_fill((torch.arange(audio.shape[2]) >= lengths.cpu()[:, None])[:, None], 0)
    if not (finite := audio.isfinite()).all():
        item, channel, sample = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"the audio is not finite: {float(audio[item, channel, sample])} at sample {sample} "
            f"({sample / config.sampling_rate:.3f} s) of channel {channel} of item {item}"
        )
    if (peak := float(audio.abs().amax())) > LARGEST_PEAK and "peak" not in warned:
        warned.add("peak")
        text = f"samples reach {peak:g} where -1..1 is expected; divide 16-bit samples by 32768"
        warnings.warn(text, stacklevel=4)


def check_level(config: MossAudioTokenizerConfig, audio: Tensor, lengths: Tensor, warned: set[str]) -> None:
    """Warn once of a clip that is far from the level that the configuration names as that of the training data."""
    expected = getattr(config, "training_level_db", None)
    if expected is None or "level" in warned or not can_read(audio):
        return
    far = [level for level in level_db(audio.detach(), lengths.cpu()).tolist() if is_far(level, expected)]
    if far:
        warned.add("level")
        text = f"audio at {far[0]:.0f} dB; the model was trained at about {expected:g} dB (see loudness=)"
        warnings.warn(text, stacklevel=4)


def valid_lengths(mask: Any, batch: int, longest: int, device: torch.device) -> Tensor:
    """Return how many of `longest` samples or frames of each item are real, [B], from a mask [B, longest]."""
    if mask is None:
        return torch.full((batch,), longest, device=device)
    mask = as_tensor(mask, "padding_mask").to(torch.bool)
    if mask.ndim == 3 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.shape != (batch, longest):
        raise ValueError(f"padding_mask must have shape {(batch, longest)}, got {tuple(mask.shape)}")
    if can_read(mask) and (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("padding_mask must be true for the first samples of each item and false for the padding after")
    return mask.to(device).sum(dim=-1)


def check_codes(config: MossAudioTokenizerConfig, values: Any) -> Tensor:
    """Return integer codes [n, B, frames] of this model as a tensor; refuse all else."""
    codes = as_tensor(values, "codes")
    levels, size = config.num_quantizers, config.quantizer_kwargs["codebook_size"]
    if codes.ndim == 3 and codes.shape[0] > levels >= codes.shape[1] and not codes.is_floating_point():
        raise ValueError(
            f"expected codes [levels, batch, frames] of at most {levels} levels, got {tuple(codes.shape)}; "
            "codes [batch, levels, frames] need transpose(0, 1)"
        )
    if codes.ndim != 3 or not 1 <= codes.shape[0] <= levels or codes.is_floating_point():
        raise ValueError(f"expected integer codes [1..{levels}, B, frames], got {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() and can_read(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise ValueError(f"codes must lie in 0..{size - 1}, got {int(codes.min())}..{int(codes.max())}")
    return codes


def chunk_frames(config: MossAudioTokenizerConfig, chunk_duration: float | None) -> int | None:
    """Return the frames per chunk of so many seconds; None stays None."""
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


LARGEST_GAIN_DB = 40.0  # more would only raise the noise of a nearly silent clip


def as_tensor(values: Any, name: str) -> Tensor:
    """Return a tensor of a tensor, an array, or nested sequences of numbers, arrays or tensors of equal shape.

    Raises:
        ValueError: anything else, or parts of different shapes; `name` is what the message calls them.
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
        return torch.tensor(values)  # a copy: arrays that are read-only would be shared otherwise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be a tensor, an array or lists of numbers, got {type(values).__name__}"
        ) from error


def pad_together(clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack tensors [X, T] of different T to one [B, X, T], zeros behind, with a mask [B, T] of what is real."""
    if not clips or any(clip.ndim != 2 or clip.shape[0] != clips[0].shape[0] for clip in clips):
        raise ValueError(f"expected tensors [X, T] that differ in T only, got {[tuple(clip.shape) for clip in clips]}")
    longest = max(clip.shape[1] for clip in clips)
    lengths = torch.tensor([clip.shape[1] for clip in clips], device=clips[0].device)
    padded = torch.stack([F.pad(clip, (0, longest - clip.shape[1])) for clip in clips])
    return padded, torch.arange(longest, device=lengths.device) < lengths[:, None]


def level_db(audio: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return the RMS level [B] of audio [B, C, T] in dB relative to full scale; -inf for silence.

    Args:
        lengths: [B] samples of each item that count, None for all.
    """
    count = torch.full(audio.shape[:1], audio.shape[2], device=audio.device) if lengths is None else lengths
    is_padding = torch.arange(audio.shape[2], device=audio.device) >= count[:, None]
    energy = audio.float().masked_fill(is_padding[:, None], 0).square().sum(dim=(1, 2))
    return 10 * torch.log10(energy / (count.clamp(min=1) * audio.shape[1]))


def set_level(audio: Tensor, level: float, lengths: Tensor | None = None) -> Tensor:
    """Scale every item of audio [B, C, T] to an RMS level in dB relative to full scale.

    The gain is at most 40 dB and, unless the input is louder already, leaves peaks below full scale; silence stays.

    Raises:
        ValueError: a level that is not a number below 0.
    """
    if not -100 <= level <= 0:
        raise ValueError(f"loudness is a level in dB relative to full scale, from -100 to 0, got {level}")
    gain_db = (level - level_db(audio, lengths)).clamp(max=LARGEST_GAIN_DB)
    gain = 10 ** (gain_db / 20)
    count = torch.full(audio.shape[:1], audio.shape[2], device=audio.device) if lengths is None else lengths
    is_padding = torch.arange(audio.shape[2], device=audio.device) >= count[:, None]
    peak = audio.float().abs().masked_fill(is_padding[:, None], 0).amax(dim=(1, 2))
    gain = torch.minimum(gain, (1 / peak).clamp(min=1))
    gain = torch.where(peak > 0, gain, torch.ones_like(gain))
    return audio * gain.to(audio.dtype)[:, None, None]


def is_far(level: float, expected: float, tolerance: float = 12.0) -> bool:
    """Return whether a level differs by more than `tolerance` dB from what is expected; silence does not count."""
    return math.isfinite(level) and abs(level - expected) > tolerance
