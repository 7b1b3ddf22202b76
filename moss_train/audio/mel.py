"""Mel spectrograms: the Slaney filter bank and the logarithm that training, evaluation and plots share."""

import warnings
from functools import lru_cache

import torch
import torchaudio
from torch import Tensor

from moss_train.audio.stft import stft_magnitudes

FLOOR = 1e-5


def log_mel_spectrogram(
    waveform: Tensor, sampling_rate: int, window_length: int, num_mels: int, floor: float = FLOOR
) -> Tensor:
    """Compute log10 of the Slaney mel spectrogram of normalised STFT magnitudes (power 1), not below log10(floor).

    waveform [..., T] -> [..., num_mels, T // hop + 1] float32, hop = window_length // 4. Filters without any bin
    (short windows at high sampling rates) give the floor.
    """
    magnitudes = stft_magnitudes(waveform, window_length)
    with torch.autocast(waveform.device.type, enabled=False):
        mel = magnitudes @ mel_bank(sampling_rate, window_length, num_mels, waveform.device)
    return mel.clamp(min=floor).log10().transpose(-1, -2)


@lru_cache(maxsize=64)
def mel_bank(sampling_rate: int, window_length: int, num_mels: int, device: torch.device) -> Tensor:
    """Return Slaney mel filters of unit area from 0 Hz to the Nyquist frequency, [window_length // 2 + 1, num_mels].

    Cached outside the modules for the reasons given in `moss_train.audio.stft`.
    """
    with torch.inference_mode(False), torch.device("cpu"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="At least one mel filterbank has all zero values")
        bank = torchaudio.functional.melscale_fbanks(
            window_length // 2 + 1, 0.0, sampling_rate / 2, num_mels, sampling_rate, norm="slaney", mel_scale="slaney"
        )
        return bank.to(device)
