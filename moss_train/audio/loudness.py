"""Measure loudness and bandwidth of audio."""

import math

import torch
from torch import Tensor

WINDOW_LENGTH = 2048

# ITU-R BS.1770-5, annex 1, tables 1 and 2: numerator and denominator of the two stages of K-weighting at 48 kHz.
_K_STAGES = (
    ((1.53512485958697, -2.69169618940638, 1.19839281085285), (1.0, -1.69065929318241, 0.73248077421585)),
    ((1.0, -2.0, 1.0), (1.0, -1.99004745483398, 0.99007225036621)),
)


def power_spectrum(audio: Tensor) -> Tensor:
    """Return the mean power of [C, T] by frequency, summed over channels: [WINDOW_LENGTH / 2 + 1].

    The sum over frequencies is the mean square of the audio, summed over channels.
    """
    spectrum = torch.stft(
        torch.nn.functional.pad(audio, (0, max(0, WINDOW_LENGTH - audio.shape[-1]))),
        WINDOW_LENGTH,
        window=torch.hann_window(WINDOW_LENGTH),
        pad_mode="constant",
        return_complex=True,
    )
    power = spectrum.abs().square().mean(-1).sum(0)
    power[1:-1] *= 2
    total = audio.square().mean(-1).sum()
    return power * (total / power.sum().clamp(min=1e-30))


def loudness(power: Tensor, sampling_rate: int) -> float:
    """Return the loudness in LUFS (ITU-R BS.1770-5 without gating) of a power spectrum; -inf for digital silence."""
    frequencies = torch.linspace(0, sampling_rate / 2, len(power), dtype=torch.float64)
    z = torch.exp(-2j * math.pi * frequencies / 48000)
    weights = torch.ones_like(frequencies)
    for stage in _K_STAGES:
        above, below = (torch.stack([b * z**n for n, b in enumerate(factors)]).sum(0).abs() for factors in stage)
        weights = weights * (above / below).square()
    weighted = (power.double() * weights).sum().item()
    return -0.691 + 10 * math.log10(weighted) if weighted > 0 else -math.inf


def bandwidth(power: Tensor, sampling_rate: int) -> float:
    """Return the upper edge in Hz of the highest band of about 100 Hz that is at most 70 dB below the strongest one.

    Returns 0 for silence.
    """
    step = sampling_rate / 2 / (len(power) - 1)
    size = max(1, round(100 / step))
    bands = power[: len(power) // size * size].reshape(-1, size).sum(1)
    if bands.max() <= 0:
        return 0.0
    there = (bands >= bands.max() * 10**-7.0).nonzero()
    return (int(there[-1]) + 1) * size * step
