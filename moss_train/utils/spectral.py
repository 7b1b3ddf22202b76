"""The short-time Fourier transform that losses and discriminators share.

Windows are computed when first needed and kept outside any module: they appear in no state dict, and a module that was
built on the meta device never carries a window that was not initialised.
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def normalized_hann_window(window_length: int, device: torch.device) -> Tensor:
    """Periodic Hann window divided by the root of its energy: noise then has one level at every window length.

    Returns [window_length] float32. The inference-mode guard matters: a window first used in validation would
    otherwise be an inference tensor, which autograd refuses to save in training.
    """
    with torch.inference_mode(False):
        window = torch.hann_window(window_length, dtype=torch.float64, device="cpu")
        return (window / window.square().sum().sqrt()).float().to(device)


def normalized_stft(waveform: Tensor, window_length: int, hop_length: int) -> Tensor:
    """Complex spectrogram of a waveform, divided by sqrt(sum of window^2), in float32 even under autocast.

    waveform [..., T] -> complex64 [..., window_length // 2 + 1, T // hop_length + 1]. Frame t is centred on sample
    t * hop_length, with zeros outside the waveform: zeros appended to a clip leave its frames as they are.
    `torch.stft(normalized=True)` is another normalisation (by sqrt(window_length)).
    """
    with torch.autocast(waveform.device.type, enabled=False):
        spectrum = torch.stft(
            waveform.reshape(-1, waveform.shape[-1]).float(),
            n_fft=window_length,
            hop_length=hop_length,
            window=normalized_hann_window(window_length, waveform.device),
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
    return spectrum.reshape(*waveform.shape[:-1], *spectrum.shape[-2:])
