"""Least-squares adversarial losses and relative feature matching.

They take the logits and features of K sub-discriminators, each with the clip as first axis. A value is averaged within
a clip first and then summed over clips and divided by `num_samples`, the number of clips of the whole update (all
micro-batches, all ranks), so that the values of parts add up to the value of the whole.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def discriminator_loss(
    real_logits: Sequence[Tensor], generated_logits: Sequence[Tensor], num_samples: Tensor | int
) -> Tensor:
    """LSGAN loss of the discriminators: mean over K of (1 - D(x))^2 + D(x^)^2 (arXiv 1611.04076).

    Both arguments: K tensors [B, ...]. The generated waveform has to be detached by the caller.
    """
    pairs = zip(real_logits, generated_logits, strict=True)
    losses = [_mean_square(1 - real.float()) + _mean_square(generated.float()) for real, generated in pairs]
    return torch.stack(losses).mean(0).sum() / num_samples


def generator_loss(generated_logits: Sequence[Tensor], num_samples: Tensor | int) -> Tensor:
    """LSGAN loss of the generator: mean over K of (1 - D(x^))^2. Argument: K tensors [B, ...]."""
    losses = [_mean_square(1 - generated.float()) for generated in generated_logits]
    return torch.stack(losses).mean(0).sum() / num_samples


def feature_matching_loss(
    real_features: Sequence[Sequence[Tensor]],
    generated_features: Sequence[Sequence[Tensor]],
    num_samples: Tensor | int,
    eps: float = 1e-5,
) -> Tensor:
    """L1 between features relative to their size: mean over K and layers of mean|D(x) - D(x^)| / max(mean|D(x)|, eps).

    Both arguments: for each of K sub-discriminators its layers, each [B, ...]; D(x) gets no gradient. The ratio is
    taken per clip: a ratio over the batch would not be the mean of the ratios of its parts.
    """
    losses = [
        torch.stack([_relative_distance(*pair, eps) for pair in zip(real, generated, strict=True)]).mean(0)
        for real, generated in zip(real_features, generated_features, strict=True)
    ]
    return torch.stack(losses).mean(0).sum() / num_samples


def _mean_square(x: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return x.square().flatten(1).mean(1)


def _relative_distance(real: Tensor, generated: Tensor, eps: float) -> Tensor:
    """[B, ...] twice -> [B]. In float32: bfloat16 features that agree to three digits would cancel to noise."""
    real = real.detach().float().flatten(1)
    distance = (real - generated.float().flatten(1)).abs().mean(1)
    return distance / real.abs().mean(1).clamp(min=eps)
