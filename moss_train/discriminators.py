"""Discriminators: networks that take one waveform [B, C, T] and return logits and feature maps.

Multi-period (HiFi-GAN, arXiv 2010.05646) and multi-resolution complex STFT in frequency bands (DAC, arXiv 2306.06546,
section 3.4). A configuration lists them as `_target_` nodes; to add one, write a class with the interface of
`Discriminator`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from moss_train.audio.stft import normalized_stft

__all__ = [
    "ComplexSTFTDiscriminator",
    "Discriminator",
    "DiscriminatorOutput",
    "DiscriminatorSet",
    "MultiPeriodDiscriminator",
    "MultiResolutionSTFTDiscriminator",
    "PeriodDiscriminator",
]

NEGATIVE_SLOPE = 0.1  # of the leaky ReLUs, as in HiFi-GAN and DAC


@dataclass(frozen=True)
class DiscriminatorOutput:
    """The output of one sub-discriminator for a batch of waveforms; the first axis of every tensor is the clip."""

    logits: Tensor  # [B, ...]: one score per position
    features: tuple[Tensor, ...]  # each [B, ...]: the activations of every hidden layer, without the logits


class Discriminator(nn.Module):
    """Base class: maps one waveform [B, C, T] -> DiscriminatorOutput.

    Whether the waveform is real or generated matters only to the losses.
    """


class DiscriminatorSet(nn.Module):
    """K sub-discriminators applied to the same waveform; nested sets are flattened, so that K counts them all."""

    def __init__(self, discriminators: Iterable[nn.Module]) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList()
        for item in discriminators:
            self.discriminators.extend(item.discriminators if isinstance(item, DiscriminatorSet) else [item])
        if not self.discriminators:
            raise ValueError("a DiscriminatorSet needs at least one discriminator, got an empty list")

    def __len__(self) -> int:
        return len(self.discriminators)

    def forward(self, waveform: Tensor) -> list[DiscriminatorOutput]:
        """Return the output of every sub-discriminator for a waveform [B, C, T], in the order of construction."""
        return [discriminator(waveform) for discriminator in self.discriminators]


def normed_conv(
    in_channels: int, out_channels: int, kernel_size: tuple[int, int], stride: tuple[int, int] = (1, 1)
) -> nn.Conv2d:
    """Return a weight-normed 2-d convolution with an odd kernel, padded so that stride 1 keeps the size."""
    padding = (kernel_size[0] // 2, kernel_size[1] // 2)
    return weight_norm(nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding))


def hidden_activations(layers: nn.ModuleList, x: Tensor) -> tuple[Tensor, ...]:
    """Pass x through convolutions, each followed by a leaky ReLU; returns the output of every layer."""
    features = []
    for layer in layers:
        # In place: the backward pass of a convolution does not need its output, so half of the activations are freed.
        x = F.leaky_relu(layer(x), NEGATIVE_SLOPE, inplace=True)
        features.append(x)
    return tuple(features)


class PeriodDiscriminator(Discriminator):
    """Convolutions along time over a waveform folded into rows of `period` samples; the columns never mix.

    The channels of the audio are input channels, not extra clips: an error between two channels, such as opposite
    polarity, can only be detected by a discriminator that gets both.
    """

    def __init__(
        self, period: int, channels: Sequence[int] = (32, 128, 512, 1024, 1024), num_channels: int = 1
    ) -> None:
        super().__init__()
        if period < 1 or not channels:
            raise ValueError(
                f"period must be positive and channels not empty, got {period=}, channels={list(channels)}"
            )
        self.period = period
        widths = (num_channels, *channels)
        strides = [3] * (len(channels) - 1) + [1]
        self.layers = nn.ModuleList(
            normed_conv(width_in, width_out, (5, 1), (stride, 1))
            for (width_in, width_out), stride in zip(pairwise(widths), strides, strict=True)
        )
        self.output = normed_conv(widths[-1], 1, (3, 1))

    def forward(self, waveform: Tensor) -> DiscriminatorOutput:
        """Map [B, C, T], any T -> logits [B, 1, rows, period], features [B, width, rows, period] per layer."""
        features = hidden_activations(self.layers, self._fold(waveform))
        return DiscriminatorOutput(self.output(features[-1]), features)

    def _fold(self, waveform: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, ceil(T / period), period], the last row completed by reflection."""
        missing = -waveform.shape[-1] % self.period
        if missing:
            # Not F.pad, whose gradient on a GPU depends on the order in which threads finish.
            waveform = torch.cat((waveform, waveform[..., -1 - missing : -1].flip(-1)), dim=-1)
        return waveform.unflatten(-1, (-1, self.period))


class MultiPeriodDiscriminator(DiscriminatorSet):
    """One PeriodDiscriminator per period; prime periods overlap least."""

    def __init__(
        self,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        channels: Sequence[int] = (32, 128, 512, 1024, 1024),
        num_channels: int = 1,
    ) -> None:
        super().__init__(PeriodDiscriminator(period, channels, num_channels) for period in periods)


BAND_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the Nyquist frequency


class ComplexSTFTDiscriminator(Discriminator):
    """2-d convolutions over real and imaginary parts of one STFT, with separate weights for each frequency band.

    The complex spectrum keeps the phase. The channels of the audio are input channels (2 C planes), so a wrong phase
    between channels can be detected too. The hop is a quarter of the window.
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
        """Map [B, C, T] -> logits [B, 1, frames, bins], features [B, width, frames, bins] per band and layer."""
        planes = self.planes(waveform)
        bands = [band(planes[..., first:end]) for (first, end), band in zip(self.band_bins, self.bands, strict=True)]
        logits = self.output(torch.cat([features[-1] for features in bands], dim=-1))
        return DiscriminatorOutput(logits, tuple(chain.from_iterable(bands)))

    def planes(self, waveform: Tensor) -> Tensor:
        """Map [B, C, T] -> [B, 2 C, frames, bins]: real and imaginary part of every channel, float32."""
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

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map [B, planes, frames, bins] -> the activations of every layer, each [B, channels, frames, fewer bins]."""
        return hidden_activations(self.layers, x)


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
    """Return (first, end) bin of every band; together they cover all window_length // 2 + 1 bins, Nyquist included."""
    if list(band_edges) != sorted(set(band_edges)) or band_edges[0] != 0 or band_edges[-1] != 1:
        raise ValueError(f"band_edges must rise from 0 to 1, got {list(band_edges)}")
    num_bins = window_length // 2 + 1
    bands = list(pairwise(int(edge * num_bins) for edge in band_edges))
    if any(first == end for first, end in bands):
        raise ValueError(f"a window of {window_length} samples is too short for the bands {list(band_edges)}")
    return bands
