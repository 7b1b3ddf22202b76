"""A loss that sees both channels at once, so that their relation is learnt and not only each of them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moss_train.audio.stft import normalized_hann_window
from moss_train.losses.base import AudioLoss
from moss_train.losses.masking import zero_beyond

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
