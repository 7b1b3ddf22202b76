"""Commitment and codebook loss of the residual quantizer; codebooks learn by gradient.

Both are squared distances between a level's latent and the codebook row that was looked up for it: mean over the
dimensions and the valid frames of a clip, zero where quantizer dropout left the level out, summed over levels, then
summed over clips and divided by the number of clips of the whole update, so that micro-batches and ranks add up.
"""

from torch import Tensor

from moss_train.losses.base import QuantizerLoss


class CommitmentLoss(QuantizerLoss):
    """Keeps the latents near the rows that they chose (see `commitment_loss`)."""

    def forward(
        self, latents: Tensor, rows: Tensor, frame_mask: Tensor, level_mask: Tensor, num_clips: Tensor | int
    ) -> Tensor:
        """Compute the loss."""
        return commitment_loss(latents, rows, frame_mask, level_mask, num_clips)


class CodebookLoss(QuantizerLoss):
    """Moves the rows to the latents that chose them (see `codebook_loss`)."""

    def forward(
        self, latents: Tensor, rows: Tensor, frame_mask: Tensor, level_mask: Tensor, num_clips: Tensor | int
    ) -> Tensor:
        """Compute the loss."""
        return codebook_loss(latents, rows, frame_mask, level_mask, num_clips)


def commitment_loss(
    latents: Tensor, rows: Tensor, frame_mask: Tensor, level_mask: Tensor, num_clips: Tensor | int
) -> Tensor:
    """Pulls the latents to their rows, which get no gradient.

    latents, rows [N, B, T, D]; frame_mask [B, T] bool, true for valid frames; level_mask [N, B] bool, true for levels
    in use; num_clips: clips of the whole update. Returns a scalar, float32.
    """
    return _squared_distance(latents, rows.detach(), frame_mask, level_mask) / num_clips


def codebook_loss(
    latents: Tensor, rows: Tensor, frame_mask: Tensor, level_mask: Tensor, num_clips: Tensor | int
) -> Tensor:
    """Pulls the rows to the latents that chose them, which get no gradient. Arguments as for `commitment_loss`."""
    return _squared_distance(latents.detach(), rows, frame_mask, level_mask) / num_clips


def _squared_distance(latents: Tensor, rows: Tensor, frame_mask: Tensor, level_mask: Tensor) -> Tensor:
    """Scalar: sum over levels and clips. What is masked is removed before squaring, so that it cannot leak a NaN."""
    in_use = frame_mask.bool() & level_mask.bool().unsqueeze(-1)
    difference = (latents.float() - rows.float()).masked_fill(~in_use.unsqueeze(-1), 0)
    num_frames = frame_mask.sum(-1).clamp(min=1)
    return (difference.square().mean(-1).sum(-1) / num_frames).sum()
