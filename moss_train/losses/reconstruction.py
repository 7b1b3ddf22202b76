"""Reconstruction losses: multi-scale mel distance, and terms for the phase or the difference of two channels.

The mel loss is the reconstruction term of training and the distance that evaluation reports: a sum over scales of the
L1 distance between log10 mel spectrograms of a normalised STFT (arXiv 2602.10934; mel counts of DAC, arXiv 2306.06546).
The hop is a quarter of the window.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moss_train.audio.stft import FLOOR, HOPS_PER_WINDOW, log_mel_distance, normalized_hann_window, normalized_stft
from moss_train.losses.base import AudioLoss, zero_beyond

WINDOW_LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
NUM_MELS = (5, 10, 20, 40, 80, 160, 320)


class MultiScaleMelLoss(AudioLoss):
    """Sum over scales of the mean over mel bins and valid frames of |log10 max(mel, floor)| differences.

    It has no parameters and no buffers. Below the floor there is no gradient: a model whose output is silent everywhere
    does not learn from this loss.
    """

    def __init__(
        self,
        sampling_rate: int,
        window_lengths: Sequence[int] = WINDOW_LENGTHS,
        num_mels: Sequence[int] = NUM_MELS,
        floor: float = FLOOR,
    ) -> None:
        super().__init__()
        if len(window_lengths) != len(num_mels):
            raise ValueError(
                f"window_lengths and num_mels must pair up, got {list(window_lengths)} and {list(num_mels)}"
            )
        if any(length % 4 for length in window_lengths):
            raise ValueError(f"window_lengths must be multiples of 4 (hop = window / 4), got {list(window_lengths)}")
        if floor <= 0:
            raise ValueError(f"floor must be positive, got {floor}")
        self.sampling_rate = sampling_rate
        self.window_lengths = tuple(window_lengths)
        self.num_mels = tuple(num_mels)
        self.floor = floor

    def counts(self, lengths: Tensor) -> Tensor:
        """Return the valid frames of every scale over all clips: what `forward` divides by.

        lengths [B] samples -> [number of scales] int64.
        """
        return torch.stack(self._clip_frames(lengths)).sum(1)

    def forward(self, reference: Tensor, degraded: Tensor, lengths: Tensor, counts: Tensor | None = None) -> Tensor:
        """Return the loss of a batch: sum over its clips, divided by `counts`, so that micro-batches and ranks add up.

        reference, degraded [B, C, T], lengths [B] samples (what lies beyond is ignored), counts [number of scales]:
        those of the whole update, by default of this batch. Channels are averaged. Returns a scalar, float32; the
        gradient reaches `degraded` only.
        """
        counts = self.counts(lengths) if counts is None else counts
        return (self._frame_sums(reference, degraded, lengths).sum(1) / counts.clamp(min=1)).sum()

    @torch.no_grad()
    def distances(self, reference: Tensor, degraded: Tensor, lengths: Tensor) -> Tensor:
        """Return the loss of each clip alone: [B, C, T] twice and lengths [B] -> [B] float32, without gradient."""
        clip_frames = torch.stack(self._clip_frames(lengths))
        return (self._frame_sums(reference, degraded, lengths) / clip_frames.clamp(min=1)).sum(0)

    def _clip_frames(self, lengths: Tensor) -> list[Tensor]:
        """Return the valid frames per scale, each [B]: frame t is valid if its centre, t * hop, is inside the clip."""
        return [(lengths + (length // 4 - 1)) // (length // 4) for length in self.window_lengths]

    def _frame_sums(self, reference: Tensor, degraded: Tensor, lengths: Tensor) -> Tensor:
        """Return the sum over valid frames of the mean over channels and mel bins, [number of scales, B]."""
        if reference.shape != degraded.shape or reference.dim() != 3:
            raise ValueError(
                f"expected two tensors of one shape [B, C, T], got {list(reference.shape)} and {list(degraded.shape)}"
            )
        reference, degraded = (zero_beyond(x.float(), lengths) for x in (reference.detach(), degraded))
        scales = zip(self.window_lengths, self.num_mels, self._clip_frames(lengths), strict=True)
        sums = []
        for window_length, num_mels, clip_frames in scales:
            per_frame = log_mel_distance(reference, degraded, self.sampling_rate, window_length, num_mels, self.floor)
            sums.append(zero_beyond(per_frame, clip_frames).sum(-1))
        return torch.stack(sums)


def multi_scale_mel_distance(reference: Tensor, degraded: Tensor, lengths: Tensor, sampling_rate: int) -> Tensor:
    """Return the mel distance of every clip at the default seven scales; 0 means identical.

    reference, degraded [B, C, T], lengths [B] samples -> [B]. It equals `MultiScaleMelLoss` of the clip alone.
    """
    return MultiScaleMelLoss(sampling_rate).distances(reference, degraded, lengths)


class ComplexSTFTLoss(AudioLoss):
    """Multi-resolution STFT loss on linear scale: L1 of real parts, of imaginary parts and of magnitudes.

    Sum over windows of the mean over channels, bins and the clip's frames of |Re X - Re X^| + |Im X - Im X^| +
    ||X| - |X^||, for an STFT with Hann windows, divided by sqrt(sum of window^2), and a hop of a quarter of the window.

    Args:
        window_lengths: in samples, multiples of 4.
    """

    def __init__(self, window_lengths: Sequence[int] = (512, 1024, 2048)) -> None:
        super().__init__()
        if any(length % HOPS_PER_WINDOW for length in window_lengths) or not window_lengths:
            raise ValueError(f"window_lengths must be multiples of {HOPS_PER_WINDOW}, got {list(window_lengths)}")
        self.window_lengths = tuple(window_lengths)

    def forward(self, reference: Tensor, degraded: Tensor, lengths: Tensor, counts: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch (see `AudioLoss.forward`); a frame counts when its centre is in the clip."""
        reference, degraded = (zero_beyond(x.float(), lengths) for x in (reference.detach(), degraded))
        losses = []  # [B] for every resolution
        for window_length in self.window_lengths:
            hop = window_length // HOPS_PER_WINDOW
            real, generated = (normalized_stft(x, window_length, hop) for x in (reference, degraded))
            parts = torch.view_as_real(real - generated).abs().sum(-1)
            per_frame = (parts + (real.abs() - generated.abs()).abs()).mean(dim=(1, 2))
            frames = -(-lengths // hop)
            losses.append(zero_beyond(per_frame, frames).sum(-1) / frames.clamp(min=1))
        return torch.stack(losses).sum() / (len(lengths) if counts is None else counts)


class WaveformLoss(AudioLoss):
    """Mean absolute difference of the samples of a clip."""

    def forward(self, reference: Tensor, degraded: Tensor, lengths: Tensor, counts: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch (see `AudioLoss.forward`)."""
        difference = zero_beyond(reference.detach().float() - degraded.float(), lengths).abs().mean(1).sum(-1)
        return (difference / lengths.clamp(min=1)).sum() / (len(lengths) if counts is None else counts)


class RelativeSquaredErrorLoss(AudioLoss):
    """Energy of a clip's error relative to the energy of the clip: 0 is perfect, a silent reconstruction has 1.

    It is dominated by loud, low harmonics, which determine the pitch. Unlike the L1 distance it does not depend on the
    level of a clip. The error of a clip quieter than `floor_rms` is divided by the energy of a clip at that level; with
    the default, -44 dB, pauses hardly count, because their noise is unpredictable.
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

    A loss on each channel alone does not notice a channel of opposite polarity; the difference signal shows it. The
    distances of logarithmic and of linear magnitudes are added; spectral convergence is left out, because it divides by
    the norm of the reference, and the difference signal of a clip with two equal channels is silence. The value is that
    of auraloss for each clip alone; here all clips are one batch.

    Args:
        window_lengths: in samples; the hop is a quarter.
    """

    def __init__(self, window_lengths: Sequence[int] = (512, 1024, 2048)) -> None:
        super().__init__()
        self.window_lengths = tuple(window_lengths)

    def forward(self, reference: Tensor, degraded: Tensor, lengths: Tensor, counts: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch (see `AudioLoss.forward`). Raises ValueError unless the audio is stereo."""
        if reference.shape[1] != 2 or degraded.shape != reference.shape:
            raise ValueError(
                "the mid/side loss needs two tensors of one shape [B, 2, T], "
                f"got {list(reference.shape)} and {list(degraded.shape)}; leave it out for mono audio"
            )
        with torch.autocast(reference.device.type, enabled=False):
            wanted, got = (_mid_and_side(zero_beyond(x.float(), lengths)) for x in (reference.detach(), degraded))
            # The transform reflects half a window at either end, so shorter clips are padded.
            longest = max(self.window_lengths)
            wanted, got = (nn.functional.pad(x, (0, max(0, longest - x.shape[-1]))) for x in (wanted, got))
            lengths = lengths.clamp(min=longest)
            losses = []  # [B] for every resolution
            for window_length in self.window_lengths:
                magnitudes, others = (_magnitudes(x, lengths, window_length) for x in (wanted, got))
                distances = (magnitudes - others).abs() + (magnitudes.log() - others.log()).abs()
                frames = lengths // (window_length // 4) + 1
                losses.append(zero_beyond(distances.mean(dim=(1, 2)), frames).sum(-1) / frames)
        return torch.stack(losses).mean(0).sum() / (len(lengths) if counts is None else counts)


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
