"""Fit the residual quantizer to data after the tokenizer has trained without it.

A residual quantizer with random projections and random codebooks hides the latent from the decoder, and for hundreds of
updates nothing that needs detail, such as the phase of a voice, gets through. A stage with `quantize: false` trains
encoder and decoder with the continuous latent. Before the stage after it, every level gets the principal directions of
what the levels before it left over, and the codes of a spherical k-means in them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moss_train.model.quantizer import LFQ, QuantizerOutput, ResidualLFQ, apply_pointwise

KMEANS_STEPS = 12


def pass_unquantized(quantizer: ResidualLFQ, latent: Tensor) -> QuantizerOutput:
    """Return the latent [B, T, D] as it comes out of both projections, with no level in use and zeros for the rest."""
    batch, frames = latent.shape[:2]
    levels = len(quantizer.quantizers)
    with torch.autocast(latent.device.type, enabled=False):
        hidden = apply_pointwise(quantizer.input_proj, latent.float())
        passed = apply_pointwise(quantizer.output_proj, hidden)
    nothing = passed.new_zeros(levels, batch, frames, 1)
    codes = torch.zeros(levels, batch, frames, dtype=torch.int64, device=latent.device)
    return QuantizerOutput(passed, codes, nothing, nothing, torch.zeros_like(codes[:, :, 0], dtype=torch.bool))


@torch.no_grad()
def fit_quantizer(quantizer: ResidualLFQ, latents: Tensor, seed: int = 0) -> list[float]:
    """Fit every level to latents; returns the share of their variance that is left after each level.

    Codes are about as long as at the usual start on the first level (a root mean square of 1 per dimension) and shorter
    on the later ones, by the same factor as what is left, so that a later level is no more sensitive than the first.

    Args:
        latents: [M, D], what the quantizer receives, at least as many as there are codes in a level.
        seed: of the first codes.

    Raises:
        ValueError: too few latents.
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
    for level in levels:
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
    """Return the row of highest cosine for every point: [M, d] and [V, d] -> [M]."""
    return (points @ F.normalize(codewords, dim=-1).T).argmax(-1)


def spherical_kmeans(points: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cluster points [M, d] by direction; returns the means [size, d] of the clusters, lengths included.

    A cluster without points starts again from a random one.
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
