"""Base classes of losses, one for each part of the model that a loss can apply to, and the losses of the quantizer.

To add a loss, subclass one of them and add an entry under `objective.losses` with a `_target_` and a `weight`. Every
value is a sum over clips divided by a count of the whole update (all micro-batches, all ranks), so that the values and
gradients of the parts add up to those of the whole.

Commitment and codebook loss are squared distances between a level's latent and the codeword that was looked up for it:
mean over the dimensions and the valid frames of a clip, zero where quantizer dropout left the level out, summed over
levels. Codebooks learn by gradient.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class SubDiscriminatorOutput(Protocol):
    """What a sub-discriminator returns for a batch of clips."""

    @property
    def logits(self) -> Tensor:
        """Scores, [B, ...]."""

    @property
    def features(self) -> Sequence[Tensor]:
        """Activations of the hidden layers, each [B, ...]."""


class AudioLoss(nn.Module):
    """A loss between a recording and its reconstruction, at the decoder's output."""

    def counts(self, lengths: Tensor) -> Tensor:
        """Return what `forward` divides by, to be summed over the update: by default the number of clips.

        lengths [B] samples -> int64 of any shape.
        """
        return torch.ones_like(lengths).sum()

    def forward(self, reference: Tensor, degraded: Tensor, lengths: Tensor, counts: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch, its sum over clips divided by `counts` (by default those of this batch).

        reference, degraded [B, C, T], lengths [B] samples: the padding beyond is ignored. Returns a scalar, float32,
        whose gradient reaches `degraded` only.
        """
        raise NotImplementedError


class QuantizerLoss(nn.Module):
    """A loss between the latents of the quantizer's levels and the codewords that they chose."""

    def forward(
        self, latents: Tensor, codewords: Tensor, frame_mask: Tensor, level_mask: Tensor, num_clips: Tensor | int
    ) -> Tensor:
        """Compute the loss of a batch, its sum over clips divided by `num_clips`.

        latents, codewords [N, B, T, D]; frame_mask [B, T] bool, true for valid frames; level_mask [N, B] bool, true for
        levels in use. Returns a scalar, float32.
        """
        raise NotImplementedError


class AdversarialLoss(nn.Module):
    """A loss of the generator on the outputs of K sub-discriminators for real and for generated audio.

    If it has a method `discriminator_loss` with the same arguments, the discriminators are trained with that method.
    """

    def forward(
        self,
        real: Sequence[SubDiscriminatorOutput],
        generated: Sequence[SubDiscriminatorOutput],
        num_clips: Tensor | int,
    ) -> Tensor:
        """Compute the loss of a batch, its sum over clips divided by `num_clips`. Returns a scalar, float32."""
        raise NotImplementedError


def zero_beyond(x: Tensor, lengths: Tensor) -> Tensor:
    """Set everything beyond each clip's length to zero, in value and in gradient, even NaN.

    x [B, ..., T], lengths [B] in units of the last axis -> as x.
    """
    beyond = torch.arange(x.shape[-1], device=x.device) >= lengths.to(x.device).unsqueeze(-1)
    return x.masked_fill(beyond.view(len(lengths), *[1] * (x.dim() - 2), -1), 0)


class CommitmentLoss(QuantizerLoss):
    """Keeps the latents near the codewords that they chose (see `commitment_loss`)."""

    def forward(
        self, latents: Tensor, codewords: Tensor, frame_mask: Tensor, level_mask: Tensor, num_clips: Tensor | int
    ) -> Tensor:
        """Compute the loss."""
        return commitment_loss(latents, codewords, frame_mask, level_mask, num_clips)


class CodebookLoss(QuantizerLoss):
    """Moves the codewords to the latents that chose them (see `codebook_loss`)."""

    def forward(
        self, latents: Tensor, codewords: Tensor, frame_mask: Tensor, level_mask: Tensor, num_clips: Tensor | int
    ) -> Tensor:
        """Compute the loss."""
        return codebook_loss(latents, codewords, frame_mask, level_mask, num_clips)


def commitment_loss(
    latents: Tensor, codewords: Tensor, frame_mask: Tensor, level_mask: Tensor, num_clips: Tensor | int
) -> Tensor:
    """Compute the loss that pulls the latents to their codewords; the codewords get no gradient.

    latents, codewords [N, B, T, D]; frame_mask [B, T] bool, true for valid frames; level_mask [N, B] bool, true for
    levels in use; num_clips: clips of the whole update. Returns a scalar, float32.
    """
    return _squared_distance(latents, codewords.detach(), frame_mask, level_mask) / num_clips


def codebook_loss(
    latents: Tensor, codewords: Tensor, frame_mask: Tensor, level_mask: Tensor, num_clips: Tensor | int
) -> Tensor:
    """Compute the loss that pulls the codewords to the latents that chose them; the latents get no gradient.

    Arguments as for `commitment_loss`.
    """
    return _squared_distance(latents.detach(), codewords, frame_mask, level_mask) / num_clips


def _squared_distance(latents: Tensor, codewords: Tensor, frame_mask: Tensor, level_mask: Tensor) -> Tensor:
    """Return the sum over levels and clips, a scalar. Masked values are removed before squaring: no NaN can leak."""
    in_use = frame_mask.bool() & level_mask.bool().unsqueeze(-1)
    difference = (latents.float() - codewords.float()).masked_fill(~in_use.unsqueeze(-1), 0)
    num_frames = frame_mask.sum(-1).clamp(min=1)
    return (difference.square().mean(-1).sum(-1) / num_frames).sum()
