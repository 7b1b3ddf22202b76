"""Fit levels of the residual quantizer to data, after the tokenizer has trained without them.

A residual quantizer with random projections and codebooks destroys most of the latent: for hundreds of updates the
decoder gets no fine detail, such as the phase of a voice. A stage with `quantize: false` therefore trains encoder and
decoder on the continuous latent. Before the next stage, every level is fitted: it projects onto the principal
directions of the residual that the earlier levels leave, and its codebook comes from a spherical k-means there. Levels
that are added to a trained model are fitted to what its own levels leave; random ones would spoil its audio.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moss_train.model.quantizer import LFQ, QuantizerOutput, ResidualLFQ, apply_pointwise

KMEANS_STEPS = 12


def pass_unquantized(quantizer: ResidualLFQ, latent: Tensor) -> QuantizerOutput:
    """Pass the latent [B, T, D] through both projections without quantizing; codes are zero and no level is in use."""
    batch, frames = latent.shape[:2]
    levels = len(quantizer.quantizers)
    with torch.autocast(latent.device.type, enabled=False):
        hidden = apply_pointwise(quantizer.input_proj, latent.float())
        passed = apply_pointwise(quantizer.output_proj, hidden)
    nothing = passed.new_zeros(levels, batch, frames, 1)
    codes = torch.zeros(levels, batch, frames, dtype=torch.int64, device=latent.device)
    return QuantizerOutput(passed, codes, nothing, nothing, torch.zeros_like(codes[:, :, 0], dtype=torch.bool))


@torch.no_grad()
def fit_quantizer(quantizer: ResidualLFQ, latents: Tensor, seed: int = 0, num_kept: int = 0) -> list[float]:
    """Fit levels to latents and return the share of their variance that is left after each level.

    On the first fitted level, codewords are about as long as after the usual initialisation (a root mean square of 1
    per dimension). Later levels use the same scale, so their codewords shrink along with the residual, and a later
    level is no more sensitive than the first.

    Args:
        latents: [M, D], inputs of the quantizer; M is at least the codebook size.
        seed: seed for the k-means.
        num_kept: number of first levels that stay as they are.

    Raises:
        ValueError: there are fewer latents than codes in a level.
    """
    levels = [level for level in quantizer.quantizers if isinstance(level, LFQ)]
    size = levels[0].codebook.num_embeddings
    if len(latents) < size:
        raise ValueError(f"{len(latents)} frames are too few for codebooks of {size}")
    rest = apply_pointwise(quantizer.input_proj, latents[None].float())[0].cpu().double()
    generator = torch.Generator().manual_seed(seed)
    total = (rest - rest.mean(0)).square().sum()
    scale: Tensor | None = None
    left = []
    for number, level in enumerate(levels):
        if number < num_kept:
            codes = level.search(rest[None].float().to(level.codebook.weight.device))[1]
            rest = rest - level.decode(codes)[0].cpu().double()
            left.append(((rest - rest.mean(0)).square().sum() / total.clamp(min=1e-30)).item())
            continue
        mean = rest.mean(0)
        values, vectors = torch.linalg.eigh((rest - mean).T @ (rest - mean) / len(rest))
        directions = vectors[:, -level.codebook.embedding_dim :]
        if scale is None:
            scale = values[-level.codebook.embedding_dim :].mean().clamp(min=1e-12).sqrt()
        points = (rest - mean) @ directions / scale
        codewords = spherical_kmeans(points, size, generator)
        set_pointwise(level.in_proj, directions.T / scale, -(mean @ directions) / scale)
        set_pointwise(level.out_proj, directions * scale, mean)
        level.codebook.weight.copy_(codewords)
        rest = rest - mean - codewords[nearest(points, codewords)] @ directions.T * scale
        left.append((rest.square().sum() / total.clamp(min=1e-30)).item())
    return left


def nearest(points: Tensor, codewords: Tensor) -> Tensor:
    """Return, for every point, the row of the codeword with the highest cosine: [M, d] and [V, d] -> [M]."""
    return (points @ F.normalize(codewords, dim=-1).T).argmax(-1)


def spherical_kmeans(points: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cluster points [M, d] by direction and return the cluster means [size, d], which are not normalised.

    An empty cluster restarts from a random point.
    """
    codewords = points[torch.randperm(len(points), generator=generator)[:size]].clone()
    for _ in range(KMEANS_STEPS):
        chosen = nearest(points, codewords)
        counts = torch.bincount(chosen, minlength=size)
        sums = torch.zeros_like(codewords).index_add_(0, chosen, points)
        others = points[torch.randint(len(points), (size,), generator=generator)]
        codewords = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], others)
    return codewords


def set_pointwise(module: torch.nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Set a weight-normalised convolution of kernel size 1 to a weight [out, in] and a bias [out]."""
    parts = module.parametrizations.weight  # type: ignore[union-attr]
    parts.original1.copy_(weight[:, :, None])  # type: ignore[union-attr, operator]
    parts.original0.copy_(weight.norm(dim=1)[:, None, None])  # type: ignore[union-attr, operator]
    module.bias.copy_(bias)  # type: ignore[operator]
