"""Losses that keep the phase or the relation of channels: complex STFT, waveform errors, mid and side.

The mel loss of the published objective sees magnitudes of mel bins only. A small model can lower it with harmonics in
the wrong place, which is heard as a wrong pitch. These terms see where a waveform is, not only how loud its bands
are. All are off unless they are given a weight.

A value is a mean within a clip first, then summed over clips and divided by the number of clips of the whole update.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moss_train.audio.stft import HOPS_PER_WINDOW, normalized_hann_window, normalized_stft
from moss_train.losses.base import AudioLoss, zero_beyond


class ComplexSTFTLoss(AudioLoss):
    """Multi-resolution STFT loss on linear scale: L1 of real parts, of imaginary parts and of magnitudes.

    Sum over windows of the mean over channels, bins and the clip's frames of |Re X - Re X^| + |Im X - Im X^| +
    ||X| - |X^||, for an STFT that is divided by sqrt(sum of window^2), Hann windows, a hop of a quarter window.

    Args:
        window_lengths: in samples, multiples of 4.
    """

    def __init__(self, window_lengths: Sequence[int] = (512, 1024, 2048)) -> None:
        super().__init__()
        if any(length % HOPS_PER_WINDOW for length in window_lengths) or not window_lengths:
            raise ValueError(f"window_lengths must be multiples of {HOPS_PER_WINDOW}, got {list(window_lengths)}")
        self.window_lengths = tuple(window_lengths)

    def forward(self, reference: Tensor, degraded: Tensor, lengths: Tensor, counts: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch (see `AudioLoss.forward`)."""
        reference, degraded = (zero_beyond(x.float(), lengths) for x in (reference.detach(), degraded))
        losses = [self._clip_losses(reference, degraded, lengths, length) for length in self.window_lengths]
        return torch.stack(losses).sum() / (len(lengths) if counts is None else counts)

    def _clip_losses(self, reference: Tensor, degraded: Tensor, lengths: Tensor, window_length: int) -> Tensor:
        """Losses at one resolution, [B]; frame t counts when its centre lies inside the clip."""
        hop = window_length // HOPS_PER_WINDOW
        real, generated = (normalized_stft(x, window_length, hop) for x in (reference, degraded))
        parts = torch.view_as_real(real - generated).abs().sum(-1)
        per_frame = (parts + (real.abs() - generated.abs()).abs()).mean(dim=(1, 2))
        frames = -(-lengths // hop)
        return zero_beyond(per_frame, frames).sum(-1) / frames.clamp(min=1)


class WaveformLoss(AudioLoss):
    """Mean absolute difference of the samples of a clip."""

    def forward(self, reference: Tensor, degraded: Tensor, lengths: Tensor, counts: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch (see `AudioLoss.forward`)."""
        difference = zero_beyond(reference.detach().float() - degraded.float(), lengths).abs().mean(1).sum(-1)
        return (difference / lengths.clamp(min=1)).sum() / (len(lengths) if counts is None else counts)


class RelativeSquaredErrorLoss(AudioLoss):
    """Compute the energy of a clip's error over the energy of the clip: 0 is perfect, silence has 1.

    Loud, low harmonics dominate it, which is what fixes the pitch. Unlike the L1 distance it does not depend on the
    level of a clip. Clips quieter than `floor_rms` are divided by the energy of such a clip; the default, -44 dB, keeps
    pauses, whose noise nobody can predict, from having a say.
    """

    def __init__(self, floor_rms: float = 6.3e-3) -> None:
        super().__init__()
        if not floor_rms > 0:
            raise ValueError(f"floor_rms must be above 0, got {floor_rms}")
        self.floor_power = floor_rms**2

    def forward(self, reference: Tensor, degraded: Tensor, lengths: Tensor, counts: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch (see `AudioLoss.forward`)."""
        reference = zero_beyond(reference.detach().float(), lengths)
        error = (reference - zero_beyond(degraded.float(), lengths)).square().sum((1, 2))
        floor = self.floor_power * reference.shape[1] * lengths.clamp(min=1)
        relative = error / torch.maximum(reference.square().sum((1, 2)), floor)
        return relative.sum() / (len(lengths) if counts is None else counts)


HANN_ENERGY = 3 / 8  # mean square of a periodic Hann window
SMALLEST_POWER = 1e-8  # of an STFT bin, as in auraloss


class MidSideLoss(AudioLoss):
    """Multi-resolution STFT loss of L + R and L - R (arXiv 2010.10291), each clip at its own length.

    A loss on each channel alone is blind to a channel of opposite polarity; the difference signal is not. Logarithmic
    plus linear magnitude; spectral convergence is left out: it divides by the norm of the reference, and the
    difference signal of a clip with two equal channels is silence. The value is that of auraloss for each clip alone;
    here all clips are one batch.

    Args:
        window_lengths: in samples; the hop is a quarter.
    """

    def __init__(self, window_lengths: Sequence[int] = (512, 1024, 2048)) -> None:
        super().__init__()
        self.window_lengths = tuple(window_lengths)

    def forward(self, reference: Tensor, degraded: Tensor, lengths: Tensor, counts: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch (see `AudioLoss.forward`). ValueError for audio that has not two channels."""
        if reference.shape[1] != 2 or degraded.shape != reference.shape:
            raise ValueError(
                "the mid/side loss needs two tensors of one shape [B, 2, T], "
                f"got {list(reference.shape)} and {list(degraded.shape)}; leave it out for mono audio"
            )
        with torch.autocast(reference.device.type, enabled=False):
            wanted, got = (_mid_and_side(zero_beyond(x.float(), lengths)) for x in (reference.detach(), degraded))
            # The transform reflects half a window at either end, which a shorter clip does not have.
            longest = max(self.window_lengths)
            wanted, got = (nn.functional.pad(x, (0, max(0, longest - x.shape[-1]))) for x in (wanted, got))
            lengths = lengths.clamp(min=longest)
            losses = [self._clip_losses(wanted, got, lengths, length) for length in self.window_lengths]
        return torch.stack(losses).mean(0).sum() / (len(lengths) if counts is None else counts)

    def _clip_losses(self, reference: Tensor, degraded: Tensor, lengths: Tensor, window_length: int) -> Tensor:
        """Mean over mid and side, bins and the clip's frames at one resolution, [B]."""
        wanted, got = (_magnitudes(x, lengths, window_length) for x in (reference, degraded))
        distances = (wanted - got).abs() + (wanted.log() - got.log()).abs()
        frames = lengths // (window_length // 4) + 1
        return zero_beyond(distances.mean(dim=(1, 2)), frames).sum(-1) / frames


def _mid_and_side(audio: Tensor) -> Tensor:
    """[B, 2, T] -> [B, 2, T]: sum and difference of the channels."""
    left, right = audio.unbind(1)
    return torch.stack((left + right, left - right), dim=1)


def _magnitudes(audio: Tensor, lengths: Tensor, window_length: int) -> Tensor:
    """STFT magnitudes of clips that are reflected at their own ends: [B, C, T] -> [B, C, bins, frames]."""
    places = torch.arange(-(window_length // 2), audio.shape[-1] + window_length // 2, device=audio.device).abs()
    last = lengths[:, None] - 1
    places = torch.where(places > last, 2 * last - places, places).clamp(min=0)
    reflected = audio.gather(2, places[:, None].expand(-1, audio.shape[1], -1))
    spectrum = torch.stft(
        reflected.flatten(0, 1),
        n_fft=window_length,
        hop_length=window_length // 4,
        window=normalized_hann_window(window_length, audio.device) * math.sqrt(HANN_ENERGY * window_length),
        center=False,
        return_complex=True,
    )
    power = spectrum.real.square() + spectrum.imag.square()
    return power.clamp(min=SMALLEST_POWER).sqrt().unflatten(0, audio.shape[:2])
