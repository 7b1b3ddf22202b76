"""Spectral distances of the published tables, and the two ways in which they are computed there.

Mel-Loss and STFT-Dist. are the multi-scale distances of DAC (arXiv 2306.06546): for each of two windows the mean
absolute difference of log10 squared magnitudes plus that of the magnitudes, summed. The evaluation code released with
MOSS-Audio-Tokenizer computes them at 16 kHz with the square root of a Hann window, audiotools at the codec's rate with
a Hann window. Values of the two do not compare, so every result carries its profile.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from moss_train.losses.mel import mel_bank

SCALES = ((2048, 150), (512, 80))
"""Window length and number of mel filters of each scale; a quarter of the window is the hop."""

FLOOR = 1e-5


@dataclass(frozen=True)
class Profile:
    """Sampling rate and window of the spectral distances."""

    name: str
    sampling_rate: int  # Hz
    is_root_window: bool  # the square root of the periodic Hann window instead of the window


PROFILES = {
    "official": Profile("official", 16_000, True),
    "dac24k": Profile("dac24k", 24_000, False),
}
"""`official`: the released evaluation code. `dac24k`: audiotools at 24 kHz, probably behind the published table."""


def mel_distance(reference: Tensor, degraded: Tensor, profile: Profile) -> float:
    """Mel-Loss of one clip: [T] twice at the profile's rate, 0 is identical."""
    total = torch.zeros((), dtype=torch.float64)
    for window_length, num_mels in SCALES:
        bank = mel_bank(profile.sampling_rate, window_length, num_mels, torch.device("cpu"))
        wanted, got = (
            (_magnitudes(x, window_length, profile.is_root_window).T @ bank).double() for x in (reference, degraded)
        )
        total += _difference(wanted, got)
    return total.item()


def stft_distance(reference: Tensor, degraded: Tensor, profile: Profile) -> float:
    """STFT-Dist. of one clip: [T] twice at the profile's rate, 0 is identical."""
    total = torch.zeros((), dtype=torch.float64)
    for window_length, _ in SCALES:
        wanted, got = (_magnitudes(x, window_length, profile.is_root_window).double() for x in (reference, degraded))
        total += _difference(wanted, got)
    return total.item()


def _difference(wanted: Tensor, got: Tensor) -> Tensor:
    logarithms = 2 * (wanted.clamp(min=FLOOR).log10() - got.clamp(min=FLOOR).log10())
    return logarithms.abs().mean() + (wanted - got).abs().mean()


def _magnitudes(audio: Tensor, window_length: int, is_root_window: bool) -> Tensor:
    """[T] -> [window_length // 2 + 1, frames], not normalised; ValueError for audio too short to be mirrored."""
    if audio.shape[-1] <= window_length // 2:
        raise ValueError(f"{audio.shape[-1]} samples are too few for a window of {window_length}")
    return torch.stft(
        audio.float(),
        n_fft=window_length,
        hop_length=window_length // 4,
        window=_window(window_length, is_root_window),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    ).abs()


@lru_cache(maxsize=8)
def _window(window_length: int, is_root_window: bool) -> Tensor:
    window = torch.hann_window(window_length)
    return window.sqrt() if is_root_window else window
