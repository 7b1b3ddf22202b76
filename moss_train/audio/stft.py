"""The short-time Fourier transform that losses and discriminators share.

Windows are computed when first needed and kept outside any module: they appear in no state dict, and a module that was
built on the meta device never carries a window that was not initialised.
"""

import math
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor
from torch.autograd.function import once_differentiable

HOPS_PER_WINDOW = 4  # of `stft_magnitudes`
PLAN_STEPS = 8
"""Number of different batch sizes, in each octave, that cuFFT is called with. It makes a plan, with memory of its own,
for every batch size, and clips of all lengths in batches of all sizes would need thousands of plans."""

SMALLEST_MAGNITUDE = 1e-20  # floor of the divisor in the gradient of a magnitude; at zero the gradient is zero


@lru_cache(maxsize=64)
def normalized_hann_window(window_length: int, device: torch.device) -> Tensor:
    """Return the periodic Hann window divided by the square root of its energy, [window_length] float32.

    Noise then has the same level at every window length. The window is made outside of inference mode: one that is
    first used in validation would otherwise be an inference tensor, which autograd refuses to save in training.
    """
    with torch.inference_mode(False):
        window = torch.hann_window(window_length, dtype=torch.float64, device="cpu")
        return (window / window.square().sum().sqrt()).float().to(device)


def normalized_stft(waveform: Tensor, window_length: int, hop_length: int) -> Tensor:
    """Return the complex spectrogram of a waveform, divided by sqrt(sum of window^2), in float32 even under autocast.

    waveform [..., T] -> complex64 [..., window_length // 2 + 1, T // hop_length + 1]. Frame t is centred on sample
    t * hop_length, with zeros outside the waveform: zeros appended to a clip do not change its frames.
    `torch.stft(normalized=True)` normalises differently (by sqrt(window_length)).
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


def stft_magnitudes(waveform: Tensor, window_length: int) -> Tensor:
    """Return the magnitudes of `normalized_stft` at a hop of a quarter of the window, in half the time and less memory.

    For losses. waveform [..., T] -> [..., T // hop + 1, window_length // 2 + 1] float32, frames before bins. Raises
    ValueError if the window is not a multiple of 4.
    """
    if window_length % HOPS_PER_WINDOW:
        raise ValueError(f"window_length must be a multiple of {HOPS_PER_WINDOW}, got {window_length}")
    with torch.autocast(waveform.device.type, enabled=False):
        magnitudes = _Magnitudes.apply(waveform.float(), normalized_hann_window(window_length, waveform.device))
    assert isinstance(magnitudes, Tensor)
    return magnitudes


class _Magnitudes(torch.autograd.Function):
    """Windowed frames -> real Fourier transform -> magnitude; the gradient takes one inverse real transform.

    Autograd would differentiate through a complex transform of all bins and keep every intermediate result.
    """

    @staticmethod
    def forward(ctx: Any, waveform: Tensor, window: Tensor) -> Tensor:
        spectrum = windowed_spectrum(waveform, window)
        magnitudes = absolute(spectrum)
        ctx.save_for_backward(spectrum, magnitudes, window)
        ctx.num_samples = waveform.shape[-1]
        return magnitudes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        spectrum, magnitudes, window = ctx.saved_tensors
        return gradient_in_waveform(gradient, spectrum, magnitudes, window, ctx.num_samples), None


def windowed_spectrum(waveform: Tensor, window: Tensor) -> Tensor:
    """Return the complex spectra [..., frames, bins] of a waveform [..., T], at a hop of a quarter of the window."""
    length = len(window)
    padded = F.pad(waveform, (length // 2, length // 2))
    frames = padded.unfold(-1, length, length // HOPS_PER_WINDOW)
    if not waveform.is_cuda:
        return torch.fft.rfft(frames * window)
    # As `transform_rows`, without a copy of all frames.
    number = math.prod(frames.shape[:-1])
    rows = frames.new_empty(round_up_rows(number), length)
    rows[number:].zero_()
    torch.mul(frames, window, out=rows[:number].view(frames.shape))
    return torch.fft.rfft(rows)[:number].unflatten(0, frames.shape[:-1])


def absolute(spectrum: Tensor) -> Tensor:
    """Return the magnitudes of complex numbers.

    On a GPU `abs` is a single kernel; on a CPU it is three times slower than the separate operations used there.
    """
    if spectrum.is_cuda:
        return spectrum.abs()
    return (spectrum.real.square() + spectrum.imag.square()).sqrt()


def gradient_in_waveform(
    gradient: Tensor, spectrum: Tensor, magnitudes: Tensor, window: Tensor, num_samples: int
) -> Tensor:
    """Return the gradient of the waveform, [..., T], from the gradient of the magnitudes of its `windowed_spectrum`."""
    factor = gradient / magnitudes.clamp(min=SMALLEST_MAGNITUDE)
    factor[..., 1:-1].mul_(0.5)  # the inverse transform counts these bins twice
    inverse = partial(torch.fft.irfft, n=len(window), norm="forward")
    frames = transform_rows(inverse, spectrum * factor, round_up=gradient.is_cuda).mul_(window)
    # The adjoint of padding by half a window and cutting into frames: overlap and add.
    count, hop = frames.shape[-2], len(window) // HOPS_PER_WINDOW
    total = frames.new_zeros(*frames.shape[:-2], count + HOPS_PER_WINDOW - 1, hop)
    for i, part in enumerate(frames.split(hop, dim=-1)):
        total[..., i : i + count, :].add_(part)
    return total.flatten(-2)[..., len(window) // 2 : len(window) // 2 + num_samples]


def transform_rows(transform: Callable[[Tensor], Tensor], rows: Tensor, round_up: bool) -> Tensor:
    """Transform the last axis of [..., L]; `round_up` adds rows of zeros, up to `round_up_rows`, for the transform."""
    if not round_up:
        return transform(rows)
    flat = rows.flatten(0, -2)
    result = transform(F.pad(flat, (0, 0, 0, round_up_rows(len(flat)) - len(flat))))
    return result[: len(flat)].unflatten(0, rows.shape[:-1])


def round_up_rows(number: int) -> int:
    """Round up to the next of `PLAN_STEPS` numbers in each octave: at most an eighth more."""
    step = max(1, 2 ** (max(1, number) - 1).bit_length() // (2 * PLAN_STEPS))
    return -(-number // step) * step


class _LogMelDistance(torch.autograd.Function):
    """`log_mel_distance`, with the gradient in `degraded` only."""

    @staticmethod
    def forward(ctx: Any, degraded: Tensor, reference: Tensor, window: Tensor, bank: Tensor, floor: float) -> Tensor:
        wanted = (absolute(windowed_spectrum(reference, window)) @ bank).clamp_(min=floor).log10_()
        spectrum = windowed_spectrum(degraded, window)
        magnitudes = absolute(spectrum)
        mel = magnitudes @ bank
        heard = mel.clamp(min=floor)
        difference = heard.log10().sub_(wanted)
        if ctx.needs_input_grad[0]:
            slope = difference.sign().div_(heard).mul_(mel >= floor)
            ctx.save_for_backward(spectrum, magnitudes, slope, window, bank)
            ctx.num_samples = degraded.shape[-1]
        return difference.abs_().mean(dim=(1, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        spectrum, magnitudes, slope, window, bank = ctx.saved_tensors
        share = gradient / (slope.shape[1] * slope.shape[3] * math.log(10))
        in_magnitudes = (slope * share[:, None, :, None]) @ bank.T
        found = gradient_in_waveform(in_magnitudes, spectrum, magnitudes, window, ctx.num_samples)
        return found, None, None, None, None


FLOOR = 1e-5


def log_mel_distance(
    reference: Tensor,
    degraded: Tensor,
    sampling_rate: int,
    window_length: int,
    num_mels: int,
    floor: float = FLOOR,
) -> Tensor:
    """Compute the L1 distance of two `log_mel_spectrogram`s, the mean over channels and mel bins of every frame.

    reference, degraded [B, C, T] float32 -> [B, T // hop + 1]. The gradient reaches `degraded` only.
    """
    window = normalized_hann_window(window_length, degraded.device)
    bank = mel_bank(sampling_rate, window_length, num_mels, degraded.device)
    with torch.autocast(degraded.device.type, enabled=False):
        distance = _LogMelDistance.apply(degraded, reference, window, bank, floor)
    assert isinstance(distance, Tensor)
    return distance


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
