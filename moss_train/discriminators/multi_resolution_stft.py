"""Multi-resolution complex STFT discriminator in frequency bands (DAC, arXiv 2306.06546, section 3.4)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moss_train.audio.stft import normalized_stft
from moss_train.discriminators.base import (
    NEGATIVE_SLOPE,
    Discriminator,
    DiscriminatorOutput,
    DiscriminatorSet,
    normed_conv,
)

BAND_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the Nyquist frequency


class ComplexSTFTDiscriminator(Discriminator):
    """2-d convolutions over real and imaginary parts of one STFT, with weights of their own for each frequency band.

    Phase is seen because the spectrum stays complex. The channels of the audio are input channels (2 C planes), so a
    wrong phase between channels is seen too. The hop is a quarter of the window.
    """

    def __init__(
        self,
        window_length: int,
        channels: int = 32,
        num_channels: int = 1,
        band_edges: Sequence[float] = BAND_EDGES,
    ) -> None:
        super().__init__()
        if window_length % 4:
            raise ValueError(f"window_length must be a multiple of 4, got {window_length}")
        self.window_length = window_length
        self.band_bins = _band_bins(window_length, band_edges)
        self.bands = nn.ModuleList(FrequencyBand(2 * num_channels, channels) for _ in self.band_bins)
        self.output = normed_conv(channels, 1, (3, 3))

    def forward(self, waveform: Tensor) -> DiscriminatorOutput:
        """waveform [B, C, T] -> logits [B, 1, frames, bins], features [B, width, frames, bins] per band and layer."""
        planes = self.planes(waveform)
        features: list[Tensor] = []
        last: list[Tensor] = []
        for (first_bin, end_bin), band in zip(self.band_bins, self.bands, strict=True):
            band_features = band(planes[..., first_bin:end_bin])
            features.extend(band_features)
            last.append(band_features[-1])
        return DiscriminatorOutput(self.output(torch.cat(last, dim=-1)), tuple(features))

    def planes(self, waveform: Tensor) -> Tensor:
        """[B, C, T] -> [B, 2 C, frames, bins]: real and imaginary part of every channel, float32."""
        spectrum = normalized_stft(waveform, self.window_length, self.window_length // 4)
        return torch.cat([spectrum.real, spectrum.imag], dim=1).transpose(2, 3)


class FrequencyBand(nn.Module):
    """The five layers of a band; three of them halve the frequency axis."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                normed_conv(in_channels, channels, (3, 9)),
                *(normed_conv(channels, channels, (3, 9), (1, 2)) for _ in range(3)),
                normed_conv(channels, channels, (3, 3)),
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, planes, frames, bins] -> the activations of every layer, each [B, channels, frames, fewer bins]."""
        features = []
        for layer in self.layers:
            # In place: the convolution does not need its result, so half of the activations need not be kept.
            x = F.leaky_relu(layer(x), NEGATIVE_SLOPE, inplace=True)
            features.append(x)
        return features


class MultiResolutionSTFTDiscriminator(DiscriminatorSet):
    """One ComplexSTFTDiscriminator per window length (samples)."""

    def __init__(
        self,
        window_lengths: Sequence[int] = (2048, 1024, 512),
        channels: int = 32,
        num_channels: int = 1,
        band_edges: Sequence[float] = BAND_EDGES,
    ) -> None:
        super().__init__(
            ComplexSTFTDiscriminator(length, channels, num_channels, band_edges) for length in window_lengths
        )


def _band_bins(window_length: int, band_edges: Sequence[float]) -> list[tuple[int, int]]:
    """First and end bin of every band; together they are all window_length // 2 + 1 bins, the Nyquist bin included."""
    if list(band_edges) != sorted(set(band_edges)) or band_edges[0] != 0 or band_edges[-1] != 1:
        raise ValueError(f"band_edges must rise from 0 to 1, got {list(band_edges)}")
    num_bins = window_length // 2 + 1
    bands = list(pairwise(int(edge * num_bins) for edge in band_edges))
    if any(first == end for first, end in bands):
        raise ValueError(f"a window of {window_length} samples is too short for the bands {list(band_edges)}")
    return bands
