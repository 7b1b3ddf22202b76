"""Spectrogram figures."""

import pytest
import torch

from moss_train.plotting import NUM_MELS, _decibels, _slaney_mel, save_spectrograms

RATE = 24_000


def test_the_png_grows_with_the_number_of_panels(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    audio = 0.1 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0))
    heights = []
    for count in (1, 3):
        path = tmp_path / f"{count}.png"
        save_spectrograms({f"version {i}": audio for i in range(count)}, RATE, path, title="clip")
        pixels = image.imread(path)
        assert pixels.std() > 0.1  # something is drawn
        heights.append(pixels.shape[0])
    assert heights[1] - heights[0] == round(2 * 1.75 * 130)


@pytest.mark.parametrize("hertz", [500, 1000, 4000, 10_000])
def test_the_frequency_axis_puts_a_tone_where_it_is(hertz):
    audio = torch.sin(2 * torch.pi * hertz * torch.arange(RATE) / RATE).unsqueeze(0)
    row = _decibels(audio, RATE).mean(1).argmax().item() + 0.5
    assert _slaney_mel(hertz) / _slaney_mel(RATE / 2) * (NUM_MELS + 1) - 0.5 == pytest.approx(row, abs=1.0)


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one waveform"):
        save_spectrograms({}, RATE, tmp_path / "x.png")
