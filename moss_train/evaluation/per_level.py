"""Measure every number of quantizer levels: mel distance of the first n levels, and codebook use."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moss_train.losses.mel import multi_scale_mel_distance


@dataclass(frozen=True)
class DepthReport:
    """Mean over clips of the seven-scale mel distance by number of levels, and the codebooks' use level by level."""

    distances: Mapping[int, float]
    used_shares: tuple[float, ...]  # entries of the level's codebook that occur
    perplexities: tuple[float, ...]  # exp of the entropy of the level's codes, in entries

    @property
    def is_monotone(self) -> bool:
        """Whether every further depth that was measured lowers the distance."""
        values = [self.distances[levels] for levels in sorted(self.distances)]
        return all(later < earlier for earlier, later in pairwise(values))


def quarter_depths(num_quantizers: int) -> tuple[int, ...]:
    """The depths of a short table: 1, a quarter, half and all of the levels."""
    return tuple(sorted({1, max(1, num_quantizers // 4), max(1, num_quantizers // 2), num_quantizers}))


@torch.no_grad()
def depth_report(tokenizer: Any, clips: Iterable[Tensor], depths: Sequence[int]) -> DepthReport:
    """Encode every clip [C, T] once and decode it at every depth.

    Args:
        tokenizer: has the pieces of `MossAudioTokenizerModel` that training uses: `encode_latent`, `quantizer`,
            `decode_latent`, `sampling_rate`, `config`. It stays in the mode it is in.

    Raises:
        ValueError: there is no clip.
    """
    config = tokenizer.config
    counts = torch.zeros(config.num_quantizers, config.quantizer_kwargs["codebook_size"])
    distances: dict[int, list[float]] = {levels: [] for levels in depths}
    device = tokenizer.quantizer.quantizers[0].codebook.weight.device
    for clip in clips:
        length = clip.shape[-1]
        audio = F.pad(clip.to(device), (0, -length % config.downsample_rate))[None]
        codes = tokenizer.quantizer.encode(tokenizer.encode_latent(audio), config.num_quantizers)
        counts += torch.stack([torch.bincount(level.flatten(), minlength=counts.shape[1]) for level in codes]).cpu()
        for levels, values in distances.items():
            restored = tokenizer.decode_latent(tokenizer.quantizer.decode(codes[:levels]))[..., :length]
            whole = torch.tensor([length], device=device)
            values.append(
                multi_scale_mel_distance(audio[..., :length], restored, whole, tokenizer.sampling_rate).item()
            )
    if not counts.any():
        raise ValueError("a depth report needs at least one clip, got none")
    shares = counts / counts.sum(dim=1, keepdim=True)
    return DepthReport(
        {levels: fmean(values) for levels, values in distances.items()},
        tuple((counts > 0).float().mean(dim=1).tolist()),
        tuple(torch.special.entr(shares).sum(dim=1).exp().tolist()),
    )
