"""Results of the public model."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class MossAudioTokenizerEncoderOutput(ModelOutput):
    """Result of `encode`.

    Attributes:
        audio_codes: [N, B, frames] int64, zero beyond an item's length.
        audio_codes_lengths: [B] int64, frames of each item; a started frame counts.
        encoder_hidden_states: [B, D, frames] latent before the quantizer.
    """

    audio_codes: Tensor | None = None
    audio_codes_lengths: Tensor | None = None
    encoder_hidden_states: Tensor | None = None


@dataclass
class MossAudioTokenizerDecoderOutput(ModelOutput):
    """Result of `decode`: audio [B, C, frames * downsample_rate] and audio_lengths [B] in samples."""

    audio: Tensor | None = None
    audio_lengths: Tensor | None = None


@dataclass
class MossAudioTokenizerOutput(ModelOutput):
    """Result of `forward`: reconstruction [B, C, T], its lengths [B], codes [N, B, frames] and their lengths [B]."""

    audio: Tensor | None = None
    audio_lengths: Tensor | None = None
    audio_codes: Tensor | None = None
    audio_codes_lengths: Tensor | None = None
