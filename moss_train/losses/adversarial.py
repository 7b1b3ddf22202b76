"""Least-squares adversarial losses and feature matching.

They take the logits and features of K sub-discriminators, each with the clip as first axis. A value is averaged within
each clip, then summed over clips and divided by `num_clips`, the number of clips of the whole update (all
micro-batches, all ranks), so that the values of the parts add up to the value of the whole.

Papers and public code differ in how they reduce further. The technical report (arXiv 2602.10934) takes means over
sub-discriminators and layers and divides feature distances by the size of the features. Public code of its authors and
of others (HiFi-GAN, DAC) takes sums of plain distances, which are ten to a hundred times larger at the same weights.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moss_train.losses.base import AdversarialLoss, SubDiscriminatorOutput

AdversarialReduction = Literal["mean", "sum"]
FeatureReduction = Literal["relative_mean", "absolute_sum"]
HIFI_GAN_FACTOR = 2.0  # of the absolute sum, as in HiFi-GAN's code


class LeastSquaresLoss(AdversarialLoss):
    """LSGAN loss of the generator, and of the discriminators (see `generator_loss`, `discriminator_loss`).

    Args:
        reduction: over sub-discriminators, "mean" (the technical report) or "sum" (public code).
    """

    def __init__(self, reduction: AdversarialReduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction, AdversarialReduction)
        self.reduction = reduction

    def forward(
        self,
        real: Sequence[SubDiscriminatorOutput],
        generated: Sequence[SubDiscriminatorOutput],
        num_clips: Tensor | int,
    ) -> Tensor:
        """Compute the generator's loss."""
        return generator_loss([output.logits for output in generated], num_clips, self.reduction)

    def discriminator_loss(
        self,
        real: Sequence[SubDiscriminatorOutput],
        generated: Sequence[SubDiscriminatorOutput],
        num_clips: Tensor | int,
    ) -> Tensor:
        """Compute the discriminators' own loss; its gradient is taken for their weights only."""
        wanted, got = ([output.logits for output in outputs] for outputs in (real, generated))
        return discriminator_loss(wanted, got, num_clips, self.reduction)


class FeatureMatchingLoss(AdversarialLoss):
    """L1 distance between the features of real and generated audio (see `feature_matching_loss`).

    Args:
        reduction: "relative_mean" (the technical report), or "absolute_sum" (public code), which counts the logits as
            one more layer.
        eps: lower bound of the feature size that the relative mean divides by.
    """

    def __init__(self, reduction: FeatureReduction = "relative_mean", eps: float = 1e-5) -> None:
        super().__init__()
        check_reduction(reduction, FeatureReduction)
        self.reduction = reduction
        self.eps = eps

    def forward(
        self,
        real: Sequence[SubDiscriminatorOutput],
        generated: Sequence[SubDiscriminatorOutput],
        num_clips: Tensor | int,
    ) -> Tensor:
        """Compute the loss; the features of real audio get no gradient."""
        takes_logits = self.reduction == "absolute_sum"
        wanted, got = (
            [(*output.features, output.logits) if takes_logits else output.features for output in outputs]
            for outputs in (real, generated)
        )
        return feature_matching_loss(wanted, got, num_clips, self.eps, self.reduction)


def discriminator_loss(
    real_logits: Sequence[Tensor],
    generated_logits: Sequence[Tensor],
    num_clips: Tensor | int,
    reduction: AdversarialReduction = "mean",
) -> Tensor:
    """Compute the discriminators' LSGAN loss (arXiv 1611.04076): mean or sum over K of (1 - D(x))^2 + D(x^)^2.

    Both arguments: K tensors [B, ...]. The generated waveform has to be detached by the caller.
    """
    pairs = zip(real_logits, generated_logits, strict=True)
    losses = [_mean_square(1 - real.float()) + _mean_square(generated.float()) for real, generated in pairs]
    return _reduce(losses, reduction).sum() / num_clips


def generator_loss(
    generated_logits: Sequence[Tensor], num_clips: Tensor | int, reduction: AdversarialReduction = "mean"
) -> Tensor:
    """Compute the generator's LSGAN loss: mean or sum over K of (1 - D(x^))^2. Argument: K tensors [B, ...]."""
    losses = [_mean_square(1 - generated.float()) for generated in generated_logits]
    return _reduce(losses, reduction).sum() / num_clips


def feature_matching_loss(
    real_features: Sequence[Sequence[Tensor]],
    generated_features: Sequence[Sequence[Tensor]],
    num_clips: Tensor | int,
    eps: float = 1e-5,
    reduction: FeatureReduction = "relative_mean",
) -> Tensor:
    """Compute the L1 distance between the features of real and generated audio.

    `relative_mean`: mean over K and over layers of mean|D(x) - D(x^)| / max(mean|D(x)|, eps), a ratio per clip, because
    a ratio over the batch would not be the mean of the ratios of its micro-batches. `absolute_sum`: twice the sum over
    K and layers of mean|D(x) - D(x^)|; to include the logits, pass them as one more layer.

    Both arguments: for each of K sub-discriminators its layers, each [B, ...]; D(x) gets no gradient. Distances are
    computed in float32: the difference of bfloat16 features that agree to three digits would be noise.
    """
    check_reduction(reduction, FeatureReduction)
    depths = [len(layers) for layers in real_features]
    if depths != [len(layers) for layers in generated_features]:
        raise ValueError(f"expected equally many layers, got {depths} and {[len(x) for x in generated_features]}")
    real = [layer.detach() for layers in real_features for layer in layers]
    generated = [layer for layers in generated_features for layer in layers]
    distances, sizes = _MeanDistances.apply(len(real), *real, *generated)
    if reduction == "absolute_sum":
        return HIFI_GAN_FACTOR * distances.sum() / num_clips
    layers_share = torch.tensor([1 / (depth * len(depths)) for depth in depths for _ in range(depth)])
    ratios = distances / sizes.clamp(min=eps)
    return (ratios * layers_share.to(ratios.device, non_blocking=True)[:, None]).sum() / num_clips


class _MeanDistances(torch.autograd.Function):
    """mean|D(x) - D(x^)| and mean|D(x)| of every layer and clip, [layers, B] float32 each.

    Layer by layer this would take ten small kernels for each; operations on the whole list take only a few.
    """

    @staticmethod
    def forward(ctx: Any, num_layers: int, *layers: Tensor) -> tuple[Tensor, Tensor]:
        real, generated = _as_float(layers[:num_layers]), _as_float(layers[num_layers:])
        difference = torch._foreach_sub(generated, real)
        counts = torch.tensor([layer[0].numel() for layer in real]).to(real[0].device, non_blocking=True)[:, None]
        distances, sizes = _clip_norms(difference) / counts, _clip_norms(real) / counts
        torch._foreach_sign_(difference)
        if layers[num_layers].dtype != torch.float32:
            signs = [torch.empty_like(layer) for layer in layers[num_layers:]]
            torch._foreach_copy_(signs, difference)
            difference = tuple(signs)
        ctx.save_for_backward(counts, *difference)
        ctx.mark_non_differentiable(sizes)
        return distances, sizes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        counts, *signs = ctx.saved_tensors
        scales = (gradient / counts).unbind()
        gradients = [
            sign * scale.to(sign.dtype).view(-1, *[1] * (sign.dim() - 1))
            for sign, scale in zip(signs, scales, strict=True)
        ]
        return (None, *[None] * len(signs), *gradients)


def _as_float(layers: Sequence[Tensor]) -> list[Tensor]:
    if all(layer.dtype == torch.float32 for layer in layers):
        return list(layers)
    copies = [torch.empty_like(layer, dtype=torch.float32) for layer in layers]
    torch._foreach_copy_(copies, list(layers))
    return copies


def _clip_norms(layers: Sequence[Tensor]) -> Tensor:
    """L1 norm of every clip of every layer: L tensors [B, ...] -> [L, B]."""
    clips = [clip for layer in layers for clip in layer.unbind()]
    return torch.stack(torch._foreach_norm(clips, 1)).view(len(layers), -1)


def _mean_square(x: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return x.square().flatten(1).mean(1)


def _reduce(losses: Sequence[Tensor], reduction: AdversarialReduction) -> Tensor:
    """K tensors [B] -> [B]."""
    check_reduction(reduction, AdversarialReduction)
    stacked = torch.stack(list(losses))
    return stacked.sum(0) if reduction == "sum" else stacked.mean(0)


def check_reduction(reduction: str, kinds: Any) -> None:
    """Raise ValueError for a reduction that is none of `kinds`, a Literal."""
    if reduction not in get_args(kinds):
        raise ValueError(f"reduction must be one of {', '.join(get_args(kinds))}, got {reduction!r}")
