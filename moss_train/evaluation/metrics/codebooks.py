"""Measure codebook use, level by level."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RELIABLE_FRAMES = 10_000
"""Below it entropies are estimated too low: at 500 frames a true entropy of 8.9 bits gives 8.0 (8.4 corrected)."""


@dataclass(frozen=True)
class LevelUse:
    """Statistics of one level over all frames."""

    level: int  # 1 is the first
    codebook_size: int
    num_frames: int
    usage: float  # share of codes that occur at all
    alive: float  # share of codes that occur at least a tenth as often as in uniform use
    entropy: float  # bits, with the correction of Miller and Madow (1955) for the finite sample
    perplexity: float  # 2 ** entropy
    top_share: float  # share of the most frequent code
    expected_usage: float  # usage that this many frames give when every code is equally likely

    @property
    def relative_entropy(self) -> float:
        """Entropy over log2 of the codebook's size: 1 is uniform use."""
        return self.entropy / math.log2(self.codebook_size) if self.codebook_size > 1 else 0.0


def count_codes(clips: Iterable[Tensor], codebook_sizes: Sequence[int]) -> list[Tensor]:
    """How often every code occurs: clips of codes [N, frames] -> for each level counts [V] int64."""
    counts = [torch.zeros(size, dtype=torch.int64) for size in codebook_sizes]
    for codes in clips:
        for level, row in enumerate(codes):
            counts[level] += torch.bincount(row, minlength=codebook_sizes[level])
    return counts


def level_use(counts: Sequence[Tensor]) -> list[LevelUse]:
    """Statistics of every level from its counts [V]; levels without frames are left out."""
    return [_level_use(level, count) for level, count in enumerate(counts, start=1) if count.sum() > 0]


def _level_use(level: int, counts: Tensor) -> LevelUse:
    size, total = len(counts), int(counts.sum())
    present = counts[counts > 0].double()
    share = present / total
    correction = (len(present) - 1) / (2 * total * math.log(2))
    entropy = min(-(share * share.log2()).sum().item() + correction, math.log2(size))
    return LevelUse(
        level=level,
        codebook_size=size,
        num_frames=total,
        usage=len(present) / size,
        alive=(counts.double() >= 0.1 * total / size).double().mean().item(),
        entropy=entropy,
        perplexity=2**entropy,
        top_share=share.max().item(),
        expected_usage=1 - (1 - 1 / size) ** total,
    )


def effective_bitrate(levels: Sequence[LevelUse], frame_rate: float, num_quantizers: int) -> float:
    """Bits per second that the first levels carry when every code costs its level's entropy."""
    return frame_rate * sum(level.entropy for level in levels[:num_quantizers])
