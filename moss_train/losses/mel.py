"""Multi-scale mel loss: the reconstruction term of training and the distance that evaluation reports.

Sum over scales of the L1 distance between log10 mel spectrograms of a normalised STFT (arXiv 2602.10934; mel counts of
DAC, arXiv 2306.06546). A quarter of the window is the hop.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moss_train.audio.mel import FLOOR, log_mel_spectrogram
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
        return torch.stack([counts.sum() for counts in self._clip_frames(lengths)])

    def forward(self, reference: Tensor, degraded: Tensor, lengths: Tensor, counts: Tensor | None = None) -> Tensor:
        """Loss of a batch: sum over its clips, divided by `counts`, so that micro-batches and ranks add up.

        reference, degraded [B, C, T], lengths [B] samples (what lies beyond is ignored), counts [number of scales]:
        those of the whole update, by default of this batch. Channels are averaged. Returns a scalar, float32; the
        gradient reaches `degraded` only.
        """
        counts = self.counts(lengths) if counts is None else counts
        return (self._frame_sums(reference, degraded, lengths).sum(1) / counts.clamp(min=1)).sum()

    @torch.no_grad()
    def distances(self, reference: Tensor, degraded: Tensor, lengths: Tensor) -> Tensor:
        """The same for every clip alone: [B, C, T] twice and lengths [B] -> [B] float32, without gradient."""
        clip_frames = torch.stack(self._clip_frames(lengths))
        return (self._frame_sums(reference, degraded, lengths) / clip_frames.clamp(min=1)).sum(0)

    def _clip_frames(self, lengths: Tensor) -> list[Tensor]:
        """Valid frames per scale, each [B]: frame t is valid when its centre, t * hop, lies inside the clip."""
        return [-(-lengths // (length // 4)) for length in self.window_lengths]

    def _frame_sums(self, reference: Tensor, degraded: Tensor, lengths: Tensor) -> Tensor:
        """Sum over the valid frames of the mean over channels and mel bins, [number of scales, B]."""
        if reference.shape != degraded.shape or reference.dim() != 3:
            raise ValueError(
                f"expected two tensors of one shape [B, C, T], got {list(reference.shape)} and {list(degraded.shape)}"
            )
        reference, degraded = (zero_beyond(x.float(), lengths) for x in (reference.detach(), degraded))
        scales = zip(self.window_lengths, self.num_mels, self._clip_frames(lengths), strict=True)
        return torch.stack([self._scale_sums(reference, degraded, *scale) for scale in scales])

    def _scale_sums(
        self, reference: Tensor, degraded: Tensor, window_length: int, num_mels: int, clip_frames: Tensor
    ) -> Tensor:
        # Two transforms, not one of the concatenation: autograd would run backwards through the reference too
        # (1.6 times the time on a CPU).
        wanted, got = (
            log_mel_spectrogram(x, self.sampling_rate, window_length, num_mels, self.floor)
            for x in (reference, degraded)
        )
        per_frame = (wanted - got).abs().mean(dim=(1, 2))
        return zero_beyond(per_frame, clip_frames).sum(-1)


def multi_scale_mel_distance(reference: Tensor, degraded: Tensor, lengths: Tensor, sampling_rate: int) -> Tensor:
    """Distance of every clip at the default seven scales: [B, C, T] twice, lengths [B] samples -> [B]; 0 is identical.

    It equals `MultiScaleMelLoss` of the clip alone.
    """
    return MultiScaleMelLoss(sampling_rate).distances(reference, degraded, lengths)
