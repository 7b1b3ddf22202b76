"""The joint objective: tensors in, named terms out; no optimizer, no Lightning.

Every term is a sum over clips divided by a count of the whole update, so micro-batches and ranks add up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moss_train.batch import Batch
from moss_train.discriminators import DiscriminatorOutput
from moss_train.losses import (
    ComplexSTFTLoss,
    MidSideLoss,
    MultiScaleMelLoss,
    WaveformLoss,
    codebook_loss,
    commitment_loss,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
)
from moss_train.losses.adversarial import AdversarialReduction, FeatureReduction, check_reduction
from moss_train.model.quantizer import QuantizerOutput

WEIGHTS = {
    "semantic": 20.0,
    "reconstruction": 15.0,
    "commitment": 0.25,
    "codebook": 1.0,
    "adversarial": 1.0,
    "feature": 2.0,
    "mid_side": 0.0,
    "complex_stft": 0.0,
    "waveform": 0.0,
}


@dataclass(frozen=True)
class UpdateCounts:
    """What the terms of one update are divided by: clips, mel frames of every scale [S], text tokens."""

    clips: Tensor
    mel_frames: Tensor
    text_tokens: Tensor

    def vector(self) -> Tensor:
        """All counts in one float64 tensor, to be reduced over ranks in one call."""
        return torch.cat((self.clips[None], self.mel_frames, self.text_tokens[None])).double()

    @classmethod
    def from_vector(cls, vector: Tensor) -> "UpdateCounts":
        """Inverse of `vector`."""
        return cls(vector[0], vector[1:-1], vector[-1])


class Objective(nn.Module):
    """Loss terms of generator and discriminators, and their weighted sum (arXiv 2603.18090, section 3).

    Args:
        sampling_rate: in Hz.
        weights: of the terms that differ from WEIGHTS (the published ones).
        crop_seconds: length of the random crop that the discriminators see, per clip.
        quantizer_dropout: share of clips that use a random prefix of the levels (1.0 in the paper); the others use all.
        adversarial_reduction: of the LSGAN losses over sub-discriminators, "mean" (the paper) or "sum" (public code).
        feature_reduction: of feature matching, "relative_mean" or "absolute_sum" (see `feature_matching_loss`).

    Raises:
        ValueError: an unknown term or reduction, or a share outside 0 ... 1.
    """

    def __init__(
        self,
        sampling_rate: int,
        weights: Mapping[str, float] | None = None,
        crop_seconds: float = 1.0,
        quantizer_dropout: float = 1.0,
        adversarial_reduction: AdversarialReduction = "mean",
        feature_reduction: FeatureReduction = "relative_mean",
    ) -> None:
        super().__init__()
        reductions = {"adversarial": AdversarialReduction, "feature": FeatureReduction}
        for name, value in (("adversarial", adversarial_reduction), ("feature", feature_reduction)):
            try:
                check_reduction(value, reductions[name])
            except ValueError as error:
                raise ValueError(f"objective.{name}_reduction: {error}") from error
        self.adversarial_reduction = adversarial_reduction
        self.feature_reduction = feature_reduction
        if not 0 <= quantizer_dropout <= 1:
            raise ValueError(f"objective.quantizer_dropout={quantizer_dropout} has to be from 0 to 1")
        self.quantizer_dropout = quantizer_dropout
        self.weights = with_weights(WEIGHTS, weights or {})
        self.mel = MultiScaleMelLoss(sampling_rate)
        self.mid_side = MidSideLoss()
        self.complex_stft = ComplexSTFTLoss()
        self.waveform = WaveformLoss()
        self.crop_length = round(crop_seconds * sampling_rate)

    def num_quantizers(self, batch: Batch, available: int) -> Tensor:
        """How many of the `available` levels each clip uses, [B] int64; a prefix is uniform over 1 ... available."""
        share = self.quantizer_dropout
        units = batch.quantizer_units.double()
        prefix = 1 + (units / max(share, 1e-9) * available).long()
        return torch.where(units < share, prefix, available).clamp(max=available)

    def count(self, batches: Sequence[Batch], device: torch.device | str = "cpu") -> UpdateCounts:
        """Counts of one rank's micro-batches, which may be none."""
        none = torch.zeros(0, dtype=torch.int64, device=device)
        lengths = torch.cat([none, *(batch.audio_lengths for batch in batches)])
        text = torch.cat([none, *(batch.text_lengths for batch in batches)])
        return UpdateCounts(torch.ones_like(lengths).sum(), self.mel.frame_counts(lengths), text.sum())

    def codec_terms(
        self,
        batch: Batch,
        reconstruction: Tensor,
        quantized: QuantizerOutput,
        frame_mask: Tensor,
        counts: UpdateCounts,
        changes: Mapping[str, float] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the terms that need no other network; those that are optional only where they have a weight.

        Args:
            reconstruction: [B, C, T].
            frame_mask: [B, F] bool, true for valid frames of codes.
            changes: the stage's own weights.
        """
        arguments = (quantized.latents, quantized.rows, frame_mask, quantized.level_mask, counts.clips)
        terms = {
            "reconstruction": self.mel(batch.audio, reconstruction, batch.audio_lengths, counts.mel_frames),
            "commitment": commitment_loss(*arguments),
            "codebook": codebook_loss(*arguments),
        }
        weights = with_weights(self.weights, changes or {})
        optional = {"mid_side": self.mid_side, "complex_stft": self.complex_stft, "waveform": self.waveform}
        for name, loss in optional.items():
            if weights[name]:
                terms[name] = loss(batch.audio, reconstruction, batch.audio_lengths, counts.clips)
        return terms

    def judge_terms(
        self, real: Sequence[DiscriminatorOutput], generated: Sequence[DiscriminatorOutput], counts: UpdateCounts
    ) -> dict[str, Tensor]:
        """The generator's adversarial and feature matching terms."""
        takes_logits = self.feature_reduction == "absolute_sum"  # as one more layer, like the public code
        wanted, features = (
            [(*output.features, output.logits) if takes_logits else output.features for output in outputs]
            for outputs in (real, generated)
        )
        logits = [output.logits for output in generated]
        return {
            "adversarial": generator_loss(logits, counts.clips, self.adversarial_reduction),
            "feature": feature_matching_loss(wanted, features, counts.clips, reduction=self.feature_reduction),
        }

    def discriminator_term(
        self, real: Sequence[DiscriminatorOutput], generated: Sequence[DiscriminatorOutput], counts: UpdateCounts
    ) -> Tensor:
        """The discriminators' own loss. Its gradient is taken for their parameters only."""
        logits = [[output.logits for output in outputs] for outputs in (real, generated)]
        return discriminator_loss(*logits, counts.clips, self.adversarial_reduction)

    def total(self, terms: Mapping[str, Tensor], changes: Mapping[str, float]) -> Tensor:
        """Weighted sum of the generator's terms; `changes` are the stage's own weights."""
        weights = with_weights(self.weights, changes)
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def crop(self, audio: Tensor, batch: Batch) -> Tensor:
        """The part of each clip that the discriminators see: [B, C, T] -> [B, C, crop_length].

        It starts where the clip's own random number says, inside its valid samples; a shorter clip is zero-padded.
        """
        length = self.crop_length
        room = (batch.audio_lengths - length).clamp(min=0)
        start = (batch.crop_units.double() * (room + 1)).long()
        index = start[:, None] + torch.arange(length, device=audio.device)
        valid = index < batch.audio_lengths[:, None]
        index = index.clamp(max=audio.shape[2] - 1)[:, None].expand(-1, audio.shape[1], -1)
        return audio.gather(2, index) * valid[:, None]


def with_weights(weights: Mapping[str, float], changes: Mapping[str, float]) -> dict[str, float]:
    """Weights with some replaced; ValueError for a term that does not exist."""
    if unknown := changes.keys() - weights.keys():
        raise ValueError(f"weights: unknown term {sorted(unknown)}, there are {sorted(weights)}")
    return {**weights, **changes}
