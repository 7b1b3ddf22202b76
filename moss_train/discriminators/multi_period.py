"""Multi-period discriminator (HiFi-GAN, arXiv 2010.05646, section 2.3): periodic structure of the waveform."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moss_train.discriminators.base import (
    NEGATIVE_SLOPE,
    Discriminator,
    DiscriminatorOutput,
    DiscriminatorSet,
    normed_conv,
)


class PeriodDiscriminator(Discriminator):
    """Convolutions along time over a waveform folded into rows of `period` samples; the columns never mix.

    The channels of the audio are input channels, not extra clips: what is wrong between two channels, such as opposite
    polarity, can only be seen by a discriminator that gets both.
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
        """waveform [B, C, T], any T -> logits [B, 1, rows, period], features [B, width, rows, period] per layer."""
        x = self._fold(waveform)
        features = []
        for layer in self.layers:
            # In place: the convolution does not need its result, so half of the activations need not be kept.
            x = F.leaky_relu(layer(x), NEGATIVE_SLOPE, inplace=True)
            features.append(x)
        return DiscriminatorOutput(self.output(x), tuple(features))

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
