"""Small random models in which every branch matters, and functions to compare their results."""

from pathlib import Path

import torch
from torch import Tensor

from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel
from tools.search_streaming import compare_codes, randomize

RATE = 160  # Hz; with patches 4, 2, 2 the stages run at 40, 20 and 10 Hz
STAGES = (
    {"patch_size": 4, "output_dimension": 12, "d_model": 16, "num_heads": 2, "num_layers": 2},
    {"patch_size": 2, "output_dimension": 16, "d_model": 16, "num_heads": 2, "num_layers": 1},
    {"patch_size": 2, "output_dimension": 24, "d_model": 32, "num_heads": 4, "num_layers": 2},
)
HOP = 16
QUANTIZER = {"rvq_dim": 20, "num_quantizers": 4, "codebook_size": 32, "codebook_dim": 6}


def small_config(context_seconds: float = 0.8, number_channels: int = 1, **options) -> MossAudioTokenizerConfig:
    """Hop 16 (8 per channel for stereo); the windows are 32, 16 and 8 frames at 0.8 s of mono."""
    arguments = {"sampling_rate": RATE, "stages": STAGES, "quantizer": QUANTIZER, **options}
    return MossAudioTokenizerConfig.from_stages(
        **arguments, context_seconds=context_seconds, number_channels=number_channels
    )


def small_model(seed: int = 0, **options) -> MossAudioTokenizerModel:
    """Return a model with random norms, gains and biases, so that no branch is nearly silent."""
    torch.manual_seed(seed)
    return randomize(MossAudioTokenizerModel(small_config(**options)).eval())


def one_stage_config(sampling_rate: int = 24000, num_quantizers: int = 3, **options) -> MossAudioTokenizerConfig:
    """One layer on patches of 480 samples, for real recordings."""
    stages = [{"patch_size": 480, "output_dimension": 16, "d_model": 32, "num_heads": 2, "num_layers": 1}]
    quantizer = {"rvq_dim": 16, "num_quantizers": num_quantizers, "codebook_size": 32, "codebook_dim": 4}
    return MossAudioTokenizerConfig.from_stages(sampling_rate, stages, quantizer, context_seconds=1.0, **options)


def save_one_stage_model(folder: Path, **options) -> None:
    """Save a model with such a configuration and always the same weights."""
    torch.manual_seed(0)
    MossAudioTokenizerModel(one_stage_config(**options)).save_pretrained(folder)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """White noise of power 1."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference divided by the largest magnitude."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


def num_real_differences(model: MossAudioTokenizerModel, hidden: Tensor, codes: Tensor, expected: Tensor) -> int:
    """Count frames whose first differing level is not a tie: the scores of the two choices differ by more than 1e-5.

    Levels after a differing one quantize another residual and are not compared.

    Args:
        hidden: [B, D, frames] that `expected` was computed from.
    """
    assert codes.shape == expected.shape
    return compare_codes(model, hidden, codes, expected)[1]
