"""The discriminator interface, and the set of sub-discriminators that training uses."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

NEGATIVE_SLOPE = 0.1  # of the leaky ReLUs, as in HiFi-GAN and DAC


@dataclass(frozen=True)
class DiscriminatorOutput:
    """What one sub-discriminator says about a batch of waveforms; the first axis of every tensor is the clip."""

    logits: Tensor  # [B, ...]: one score per position that it looks at
    features: tuple[Tensor, ...]  # each [B, ...]: the activations of every hidden layer, without the logits


class Discriminator(nn.Module):
    """A function of one waveform [B, C, T] -> DiscriminatorOutput.

    It does not know whether the waveform is real, the losses do.
    """


class DiscriminatorSet(nn.Module):
    """K sub-discriminators applied to the same waveform; sets inside sets are flattened, so that K counts them all."""

    def __init__(self, discriminators: Iterable[nn.Module]) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(leaf for item in discriminators for leaf in _leaves(item))
        if not self.discriminators:
            raise ValueError("a DiscriminatorSet needs at least one discriminator, got an empty list")

    def __len__(self) -> int:
        return len(self.discriminators)

    def forward(self, waveform: Tensor) -> list[DiscriminatorOutput]:
        """Output of every sub-discriminator for a waveform [B, C, T], in the order of construction."""
        return [discriminator(waveform) for discriminator in self.discriminators]


def _leaves(item: nn.Module) -> list[nn.Module]:
    return list(item.discriminators) if isinstance(item, DiscriminatorSet) else [item]


def normed_conv(
    in_channels: int, out_channels: int, kernel_size: tuple[int, int], stride: tuple[int, int] = (1, 1)
) -> nn.Conv2d:
    """Weight-normed 2-d convolution with an odd kernel, padded so that stride 1 keeps the size."""
    padding = (kernel_size[0] // 2, kernel_size[1] // 2)
    return weight_norm(nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding))
