"""Losses of the joint training, each a sum over clips divided by a count of the whole update."""

from moss_train.losses.adversarial import (
    FeatureMatchingLoss,
    LeastSquaresLoss,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
)
from moss_train.losses.base import (
    AdversarialLoss,
    AudioLoss,
    CodebookLoss,
    CommitmentLoss,
    QuantizerLoss,
    codebook_loss,
    commitment_loss,
)
from moss_train.losses.reconstruction import (
    ComplexSTFTLoss,
    MidSideLoss,
    MultiScaleMelLoss,
    RelativeSquaredErrorLoss,
    WaveformLoss,
    multi_scale_mel_distance,
)

__all__ = [
    "AdversarialLoss",
    "AudioLoss",
    "CodebookLoss",
    "CommitmentLoss",
    "ComplexSTFTLoss",
    "FeatureMatchingLoss",
    "LeastSquaresLoss",
    "MidSideLoss",
    "MultiScaleMelLoss",
    "QuantizerLoss",
    "RelativeSquaredErrorLoss",
    "WaveformLoss",
    "codebook_loss",
    "commitment_loss",
    "discriminator_loss",
    "feature_matching_loss",
    "generator_loss",
    "multi_scale_mel_distance",
]
