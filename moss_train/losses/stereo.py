"""A loss that sees both channels at once, so that their relation is learnt and not only each of them."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from auraloss.freq import SumAndDifferenceSTFTLoss
from torch import Tensor, nn


class MidSideLoss(nn.Module):
    """Multi-resolution STFT loss of L + R and L - R (arXiv 2010.10291), clip by clip.

    A loss on each channel alone is blind to a channel of opposite polarity; the difference signal is not. Logarithmic
    plus linear magnitude; spectral convergence is left out: it divides by the norm of the reference, and the
    difference signal of a clip with two equal channels is silence.
    """

    def __init__(self, window_lengths: Sequence[int] = (512, 1024, 2048)) -> None:
        super().__init__()
        self.window_lengths = tuple(window_lengths)

    def forward(
        self, reference: Tensor, degraded: Tensor, lengths: Tensor, num_clips: Tensor | int | None = None
    ) -> Tensor:
        """Sum over clips divided by `num_clips`: the clips of the whole update, by default of this batch.

        reference, degraded [B, 2, T], lengths [B] samples. Returns a scalar, float32; no gradient to the reference.
        ValueError for audio that has not two channels.
        """
        if reference.shape[1] != 2 or degraded.shape != reference.shape:
            raise ValueError(
                "the mid/side loss needs two tensors of one shape [B, 2, T], "
                f"got {list(reference.shape)} and {list(degraded.shape)}; leave it out for mono audio"
            )
        with torch.autocast(reference.device.type, enabled=False):
            clips = zip(reference.detach().float(), degraded.float(), lengths.tolist(), strict=True)
            losses = [self._clip_loss(target[:, :length], x[:, :length]) for target, x, length in clips]
        return torch.stack(losses).sum() / (len(losses) if num_clips is None else num_clips)

    def _clip_loss(self, reference: Tensor, degraded: Tensor) -> Tensor:
        # The transform reflects half a window at either end, which a shorter clip does not have.
        missing = max(self.window_lengths) - reference.shape[-1]
        if missing > 0:
            reference, degraded = (nn.functional.pad(x, (0, missing)) for x in (reference, degraded))
        mid_side = _sum_and_difference(self.window_lengths, reference.device)
        return mid_side(degraded.unsqueeze(0), reference.unsqueeze(0))


@lru_cache(maxsize=8)
def _sum_and_difference(window_lengths: tuple[int, ...], device: torch.device) -> SumAndDifferenceSTFTLoss:
    """The loss with its windows on `device`. They are plain attributes: made with the module, they would stay on the
    meta device, and moved in validation they would become inference tensors.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        loss = SumAndDifferenceSTFTLoss(
            fft_sizes=list(window_lengths),
            hop_sizes=[length // 4 for length in window_lengths],
            win_lengths=list(window_lengths),
            window="hann_window",
            w_sc=0.0,
            w_log_mag=1.0,
            w_lin_mag=1.0,
        )
        for scale in loss.mrstft.stft_losses:
            scale.window = scale.window.to(device)
    return loss
