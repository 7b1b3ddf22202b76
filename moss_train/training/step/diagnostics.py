"""What is looked at inside an update: it changes nothing and never waits for the device."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moss_train.discriminators import DiscriminatorOutput
from moss_train.training.step.objective import with_weights
from moss_train.training.step.schedule import StageMoment

OUTPUT_GRADIENT = "output_gradient/"
OUTPUT_TERMS = ("reconstruction", "adversarial", "feature", "mid_side", "complex_stft", "waveform")
"""The terms that see the decoder's output."""

OBSERVED = ("discriminator/real", "discriminator/generated", *(OUTPUT_GRADIENT + name for name in OUTPUT_TERMS))


def weights_at(weights: Mapping[str, float], moment: StageMoment) -> dict[str, float]:
    """The weight that each term really has at a moment: that of its stage, and the adversarial ramp."""
    ramps = dict.fromkeys(("adversarial", "feature"), moment.ramp)
    return {name: weight * ramps.get(name, 1.0) for name, weight in with_weights(weights, moment.stage.weights).items()}


class CodeCounts:
    """How often each code of each level was chosen, counted where the codes are: [N, V] int64."""

    def __init__(self, num_quantizers: int, codebook_size: int) -> None:
        self.counts = torch.zeros(num_quantizers, codebook_size, dtype=torch.int64)

    def add(self, codes: Tensor, frame_mask: Tensor) -> None:
        """Count codes [N, B, F] of valid frames [B, F] bool, whatever quantizer dropout makes of them."""
        self.counts = self.counts.to(codes.device)
        valid = frame_mask.flatten().to(torch.int64).expand(len(codes), -1)
        self.counts.scatter_add_(1, codes.flatten(1), valid)


def mean_logits(
    real: Sequence[DiscriminatorOutput], generated: Sequence[DiscriminatorOutput], num_clips: Tensor | int
) -> dict[str, Tensor]:
    """Mean verdict on real and on generated audio, 1 for real and 0 for generated where the discriminators are sure.

    A mean within a clip, then over sub-discriminators, then over the clips of the whole update, as the losses.
    """
    sides = {"real": real, "generated": generated}
    return {
        f"discriminator/{name}": torch.stack([output.logits.detach().float().flatten(1).mean(1) for output in outputs])
        .mean(0)
        .sum()
        / num_clips
        for name, outputs in sides.items()
    }


def squared_output_gradients(
    terms: Mapping[str, Tensor], weights: Mapping[str, float], output: Tensor
) -> dict[str, Tensor]:
    """Squared norm of each weighted term's gradient in the decoder's output [B, C, T]; the graph stays.

    Clips do not share outputs, so that the squares of micro-batches and ranks add up. One backward per term, which
    ends at the output.
    """
    seen = {name: weights[name] * terms[name] for name in OUTPUT_TERMS if name in terms}
    with torch.autocast(output.device.type, enabled=False):
        gradients = {name: torch.autograd.grad(term, output, retain_graph=True)[0] for name, term in seen.items()}
    return {OUTPUT_GRADIENT + name: gradient.float().square().sum() for name, gradient in gradients.items()}
