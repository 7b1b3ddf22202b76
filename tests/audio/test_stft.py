"""The normalised STFT against values computed by hand."""

import pytest
import torch

from moss_train.audio.stft import normalized_hann_window, normalized_stft, stft_magnitudes


def test_window_has_unit_energy():
    for length in (32, 2048):
        window = normalized_hann_window(length, torch.device("cpu"))
        torch.testing.assert_close(window.square().sum(), torch.tensor(1.0))
        torch.testing.assert_close(window / window.max(), torch.hann_window(length), atol=1e-6, rtol=0)


def test_impulse_has_the_same_magnitude_in_every_bin():
    waveform = torch.zeros(1, 4096)
    waveform[0, 1024] = 1.0
    magnitudes = normalized_stft(waveform, 256, 64).abs()
    window = torch.hann_window(256)
    assert magnitudes.shape == (1, 129, 65)
    peak = window[128] / window.square().sum().sqrt()  # frame 16 is centred on the impulse
    torch.testing.assert_close(magnitudes[0, :, 16], peak.expand(129))
    torch.testing.assert_close(magnitudes[0, :, 17], (window[64] / window.square().sum().sqrt()).expand(129))
    assert magnitudes[0, :, 18:].max() == 0  # the window is zero where it begins


def test_constant_gives_the_sum_of_the_window_over_the_root_of_its_energy():
    window = torch.hann_window(128)
    spectrum = normalized_stft(torch.ones(1, 1024), 128, 32)
    torch.testing.assert_close(spectrum[0, 0, 10].real, window.sum() / window.square().sum().sqrt())


def test_noise_has_the_same_mean_power_at_every_window_length():
    waveform = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    for length in (32, 256, 2048):
        power = normalized_stft(waveform, length, length // 4).abs().square()[:, 1:-1].mean()
        torch.testing.assert_close(power, torch.tensor(1.0), atol=0.03, rtol=0)


def test_leading_axes_are_kept_and_half_precision_becomes_float32():
    waveform = torch.randn(2, 3, 1000, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        spectrum = normalized_stft(waveform, 64, 16)
    assert spectrum.shape == (2, 3, 33, 63)
    assert spectrum.dtype == torch.complex64
    torch.testing.assert_close(spectrum[1, 2], normalized_stft(waveform[1, 2], 64, 16))


@pytest.mark.parametrize("window_length", [32, 256])
@pytest.mark.parametrize("num_samples", [1000, 1024, 70])
def test_magnitudes_and_their_gradient_are_those_of_the_complex_transform(window_length, num_samples):
    generator = torch.Generator().manual_seed(0)
    waveform = torch.randn(2, 3, num_samples, generator=generator).requires_grad_()
    expected = normalized_stft(waveform, window_length, window_length // 4).abs().transpose(-1, -2)
    weights = torch.randn(expected.shape, generator=generator)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), waveform)
    magnitudes = stft_magnitudes(waveform, window_length)
    (gradient,) = torch.autograd.grad((magnitudes * weights).sum(), waveform)
    torch.testing.assert_close(magnitudes, expected)
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)


def test_silence_has_magnitude_zero_and_no_gradient():
    silence = torch.zeros(1, 500, requires_grad=True)
    magnitudes = stft_magnitudes(silence, 64)
    magnitudes.sum().backward()
    assert magnitudes.abs().max() == 0
    assert silence.grad.abs().max() == 0


def test_magnitudes_refuse_a_window_that_four_hops_do_not_fill():
    with pytest.raises(ValueError, match="multiple of 4, got 30"):
        stft_magnitudes(torch.zeros(1, 100), 30)
