"""Complex STFT discriminator: size, bands, phase."""

import math

import pytest
import torch

from moss_train.discriminators import ComplexSTFTDiscriminator, MultiResolutionSTFTDiscriminator


def test_default_size_is_that_of_dac():
    assert sum(p.numel() for p in MultiResolutionSTFTDiscriminator().parameters()) == 1_413_990


def test_bands_cover_every_bin_once():
    for window_length in (512, 1024, 2048):
        bands = ComplexSTFTDiscriminator(window_length, 2).band_bins
        assert [index for first, end in bands for index in range(first, end)] == list(range(window_length // 2 + 1))


def test_five_layers_per_band_are_features_and_logits_are_not():
    output = ComplexSTFTDiscriminator(256, 3)(torch.randn(2, 1, 1000))
    assert len(output.features) == 5 * 5
    assert all(feature.shape[:2] == (2, 3) for feature in output.features)
    assert all(feature.shape[2] == 1000 // 64 + 1 for feature in output.features)
    assert output.logits.shape[:3] == (2, 1, 16)


def test_planes_are_real_and_imaginary_parts():
    """A cosine at the centre of bin 8 is real in frames that start at a whole period; its sine is imaginary."""
    time = torch.arange(2048) * 2 * math.pi * 8 / 256
    planes = ComplexSTFTDiscriminator(256, 2, num_channels=2).planes(torch.stack([time.cos(), time.sin()]).unsqueeze(0))
    assert planes.shape == (1, 4, 33, 129)  # real parts of both channels, then imaginary parts
    at_bin = planes[0, :, 16, 8]
    size = torch.hann_window(256).sum() / torch.hann_window(256).square().sum().sqrt() / 2
    torch.testing.assert_close(at_bin, torch.stack([size, size * 0, size * 0, -size]), atol=1e-3, rtol=0)


def test_a_band_sees_only_its_bins():
    discriminator = ComplexSTFTDiscriminator(256, 2)
    low = torch.sin(torch.arange(4096) * 2 * math.pi * 4 / 256).view(1, 1, -1)
    louder = discriminator(2 * low).features
    quiet = discriminator(low).features
    assert (louder[0] - quiet[0]).abs().max() > 1e-2
    assert (louder[20] - quiet[20])[:, :, 8:-8].abs().max() < 1e-4  # highest band, away from the ends of the clip


def test_opposite_polarity_of_channels_is_seen():
    torch.manual_seed(0)
    discriminator = ComplexSTFTDiscriminator(256, 4, num_channels=2)
    x = torch.randn(1, 2, 2000, generator=torch.Generator().manual_seed(0))
    flipped = x * torch.tensor([1.0, -1.0])[:, None]
    assert (discriminator(x).logits - discriminator(flipped).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("window_length", "band_edges", "message"),
    [
        (510, (0, 1), "multiple of 4, got 510"),
        (512, (0, 0.5), "from 0 to 1"),
        (512, (0, 0.7, 0.2, 1), "from 0 to 1"),
        (16, (0, 0.1, 1), "too short"),
    ],
)
def test_impossible_settings_are_refused(window_length, band_edges, message):
    with pytest.raises(ValueError, match=message):
        ComplexSTFTDiscriminator(window_length, 2, band_edges=band_edges)
