"""Discriminators: functions of one waveform that return logits and features."""

from moss_train.discriminators.base import Discriminator, DiscriminatorOutput, DiscriminatorSet
from moss_train.discriminators.multi_period import MultiPeriodDiscriminator, PeriodDiscriminator
from moss_train.discriminators.multi_resolution_stft import ComplexSTFTDiscriminator, MultiResolutionSTFTDiscriminator

__all__ = [
    "ComplexSTFTDiscriminator",
    "Discriminator",
    "DiscriminatorOutput",
    "DiscriminatorSet",
    "MultiPeriodDiscriminator",
    "MultiResolutionSTFTDiscriminator",
    "PeriodDiscriminator",
]
