"""Check the arguments that users pass to the model; every refusal is a ValueError with the offending value.

The values of tensors are checked on the CPU only: elsewhere the host would have to wait for the device, and a compiler
or an exporter would have to break its graph.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from .configuration_moss_audio_tokenizer import MossAudioTokenizerConfig
from .waveforms import as_tensor, check_floating, level_db, silence_beyond

FAR_DB = 12.0  # largest deviation from the level of the training data without a warning
LARGEST_PEAK = 10.0  # of a waveform in -1..1 with some overshoot; 16-bit integers go far beyond it


def can_read(values: Tensor) -> bool:
    """Return whether the host can read values without waiting for a device or breaking a graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def check_audio(config: MossAudioTokenizerConfig, values: Any) -> Tensor:
    """Convert floating-point samples to a tensor [B, C, T].

    Args:
        values: tensor, array or lists: [B, C, T]; [B, T] or [T] for one channel; [C, T] for several.
    """
    audio, channels = as_tensor(values, "waveforms"), config.number_channels
    check_floating(audio)
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
    """Raise ValueError for samples that are not finite; warn once about audio far beyond full scale.

    Args:
        audio: [B, C, T].
        lengths: [B] valid samples of each item.
        warned: kinds of warnings that this model has given; updated here.
    """
    if not can_read(audio) or not audio.numel():
        return
    audio = audio.detach()
    # The maximum is NaN if any sample is NaN, so this one pass is enough for valid audio.
    if float(audio.abs().amax()) <= LARGEST_PEAK:
        return
    audio = silence_beyond(audio, lengths.cpu())
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
    """Warn once about a clip whose level is far from `training_level_db` of the configuration."""
    expected = getattr(config, "training_level_db", None)
    if expected is None or "level" in warned or not can_read(audio):
        return
    levels = level_db(audio.detach(), lengths.cpu()).tolist()
    far = [level for level in levels if math.isfinite(level) and abs(level - expected) > FAR_DB]
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
    """Return integer codes [n, B, frames] of this model as an int64 tensor; raise ValueError for anything else."""
    codes = as_tensor(values, "codes")
    levels, size = config.num_quantizers, config.quantizer_kwargs["codebook_size"]
    is_integer = not (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool)
    if codes.ndim == 3 and codes.shape[0] > levels >= codes.shape[1] and is_integer:
        raise ValueError(
            f"expected codes [levels, batch, frames] of at most {levels} levels, got {tuple(codes.shape)}; "
            "codes [batch, levels, frames] need transpose(0, 1)"
        )
    if codes.ndim != 3 or not 1 <= codes.shape[0] <= levels or not codes.shape[1] or not is_integer:
        raise ValueError(f"expected integer codes [1..{levels}, B, frames], got {codes.dtype} {tuple(codes.shape)}")
    codes = codes.to(torch.int64)  # torch has no minimum of uint16, in which codes are often stored
    if codes.numel() and can_read(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise ValueError(f"codes must lie in 0..{size - 1}, got {int(codes.min())}..{int(codes.max())}")
    return codes


def chunk_frames(config: MossAudioTokenizerConfig, chunk_duration: float | None) -> int | None:
    """Convert a chunk's duration in seconds to frames; None stays None. Raises ValueError unless they are whole."""
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
