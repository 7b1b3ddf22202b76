"""What is measured inside an update: it changes nothing and never waits for the device."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moss_train.discriminators import DiscriminatorOutput

LOGITS = ("discriminator/real", "discriminator/generated")


def count_codes(codes: Tensor, frame_mask: Tensor, codebook_size: int) -> Tensor:
    """Count how often each code of each level was chosen: [N, V] int64, on the device of the codes.

    codes [N, B, F], frame_mask [B, F] bool, true for valid frames. Quantizer dropout makes no difference: all levels
    are searched.
    """
    counts = torch.zeros(len(codes), codebook_size, dtype=torch.int64, device=codes.device)
    valid = frame_mask.flatten().to(torch.int64).expand(len(codes), -1)
    return counts.scatter_add_(1, codes.flatten(1), valid)


def mean_logits(
    real: Sequence[DiscriminatorOutput], generated: Sequence[DiscriminatorOutput], num_clips: Tensor | int
) -> dict[str, Tensor]:
    """Mean verdict on real and on generated audio, 1 for real and 0 for generated where the discriminators are sure.

    A mean within a clip, then over sub-discriminators, then over the clips of the whole update, as the losses.
    """
    return {
        name: torch.stack([output.logits.detach().float().flatten(1).mean(1) for output in outputs]).mean(0).sum()
        / num_clips
        for name, outputs in zip(LOGITS, (real, generated), strict=True)
    }


def gradient_shares(norms: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Return each term's share of the gradient at the decoder's output, from norms before weighting.

    A share is that of the sum of norms; nothing where no term has a gradient.
    """
    weighted = {name: weights[name] * norm for name, norm in norms.items()}
    total = sum(weighted.values())
    return {name: norm / total for name, norm in weighted.items()} if total else {}
