"""Residual quantizer with factorised codes: cosine search in a few dimensions, codewords trained by gradient.

The scheme is that of the improved RVQGAN (arXiv 2306.06546) with weight-normalised projections around every level.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


@dataclass(frozen=True)
class QuantizerOutput:
    """Output of the quantizer for a batch.

    Attributes:
        quantized: [B, T, D] float32, sum of the used levels, projected back, with straight-through gradients.
        codes: [N, B, T] int64.
        latents: [N, B, T, d] the projected residual for which each level searched a codeword.
        codewords: [N, B, T, d] the codebook row that each level chose.
        level_mask: [N, B] bool, true for levels that contribute.
    """

    quantized: Tensor
    codes: Tensor
    latents: Tensor
    codewords: Tensor
    level_mask: Tensor


class LFQ(nn.Module):
    """One level: project down, find the codebook row with the highest cosine, take it unnormalised, project up.

    It holds the weights; `ResidualLFQ` computes all levels together.
    """

    def __init__(self, dimension: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.in_proj = pointwise(dimension, codebook_dim)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)
        self.out_proj = pointwise(codebook_dim, dimension)

    def search(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Map a residual [B, T, D] -> latent [B, T, d], codes [B, T]."""
        latent = apply_pointwise(self.in_proj, residual)
        # The nearest of several unit vectors has the largest inner product; the length of the latent does not matter.
        directions = F.normalize(self.codebook.weight, dim=-1)
        return latent, (latent.detach() @ directions.detach().T).argmax(dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Map codes [B, T] -> contribution [B, T, D]."""
        return apply_pointwise(self.out_proj, self.codebook(codes))


class ResidualLFQ(nn.Module):
    """Levels, each of which quantizes the residual of the previous ones; float32 throughout.

    Quantizer dropout is a mask over all levels, so that the graph is static and every parameter takes part in every
    step.
    """

    def __init__(
        self,
        input_dim: int,
        rvq_dim: int,
        output_dim: int,
        num_quantizers: int,
        codebook_size: int,
        codebook_dim: int,
        quantizer_type: str = "rlfq",
    ) -> None:
        super().__init__()
        assert quantizer_type == "rlfq"
        self.input_proj = pointwise(input_dim, rvq_dim) if input_dim != rvq_dim else nn.Identity()
        self.quantizers = nn.ModuleList([LFQ(rvq_dim, codebook_size, codebook_dim) for _ in range(num_quantizers)])
        self.output_proj = pointwise(rvq_dim, output_dim) if rvq_dim != output_dim else nn.Identity()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ResidualLFQ":
        """Move with the model but stay in float32: `model.to(bfloat16)` must not round the codebooks."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or moved.is_meta:
                return moved
            return tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def forward(self, latent: Tensor, num_quantizers: Tensor | None = None) -> QuantizerOutput:
        """Quantize [B, T, D] with every level, of which item b uses the first `num_quantizers[b]` ([B] int64)."""
        batch, frames = latent.shape[:2]
        levels = torch.arange(len(self.quantizers), device=latent.device)[:, None]
        level_mask = (levels < num_quantizers) if num_quantizers is not None else (levels >= 0).expand(-1, batch)
        with torch.autocast(latent.device.type, enabled=False):
            weights = LevelWeights.of(self)
            count, size, dim = weights.rows.shape
            hidden = apply_pointwise(self.input_proj, latent.float()).flatten(0, 1)
            first = F.linear(hidden, weights.in_weight, weights.in_bias)  # [B * T, N * d], earlier rows not subtracted
            codes, searched = weights.search(first, count)
            rows = F.embedding(codes.T + levels.T * size, weights.rows.flatten(0, 1)).flatten(1)  # [B * T, N * d]
            # Straight-through estimator: a level's output is z + c, its row with the gradient of its latent z (c is a
            # constant). As earlier outputs are subtracted, z = first - (z + c) @ earlier: one solve for all levels.
            earlier = weights.coupling * weights.is_later
            constant = (rows - searched).detach()
            latents = torch.linalg.solve_triangular(
                earlier, first - constant @ earlier, upper=True, left=False, unitriangular=True
            )
            straight_through = latents + (rows - latents).detach()
            used = level_mask.T.to(rows.dtype)  # [B, N]
            kept = straight_through.view(batch, frames, count, dim) * used[:, None, :, None]
            total = kept.flatten(2) @ weights.out_weight + (used @ weights.out_bias)[:, None]
            quantized = apply_pointwise(self.output_proj, total)
        latents, rows = (x.view(batch, frames, count, dim).permute(2, 0, 1, 3) for x in (latents, rows))
        return QuantizerOutput(quantized, codes.view(count, batch, frames), latents, rows, level_mask)

    def encode(self, latent: Tensor, num_quantizers: int) -> Tensor:
        """Return the codes [num_quantizers, B, T] of the first levels for a latent [B, T, D]."""
        return FoldedQuantizer(self).encode(latent, num_quantizers)

    def decode(self, codes: Tensor) -> Tensor:
        """Map codes [n, B, T] of the first n levels -> [B, T, D] float32."""
        return FoldedQuantizer(self).decode(codes)


class LevelWeights(NamedTuple):
    """The weights of all levels together, with their weight normalisation applied.

    The latent of level l is `in_l(r - sum of out_j(row_j) over j < l)`. These maps are linear: the latents of all
    levels come from one product with the residual r, and each chosen row changes the later latents by a small matrix.

    Attributes:
        rows: [N, V, d] of the codebooks.
        in_weight: [N * d, D].
        in_bias: [N * d], with the output biases of the earlier levels already subtracted from the residual.
        out_weight: [N * d, D].
        out_bias: [N, D].
        coupling: [N * d, N * d], what a row of one level takes from the latents of all levels; only those of later
            levels count, see `is_later`.
    """

    rows: Tensor
    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    coupling: Tensor

    @classmethod
    def of(cls, quantizer: ResidualLFQ) -> "LevelWeights":
        """Return the current weights of a quantizer, with gradients."""
        levels = cast(list[LFQ], list(quantizer.quantizers))
        in_weight, in_bias = stack_pointwise([level.in_proj for level in levels])
        out_weight, out_bias = stack_pointwise([level.out_proj for level in levels])
        out_weight = out_weight.transpose(1, 2).flatten(0, 1)
        subtracted = out_bias.cumsum(dim=0) - out_bias  # biases of the earlier levels
        in_bias = (in_bias - (in_weight @ subtracted[..., None])[..., 0]).flatten()
        in_weight = in_weight.flatten(0, 1)
        rows = torch.stack([level.codebook.weight for level in levels])
        return cls(rows, in_weight, in_bias, out_weight, out_bias, out_weight @ in_weight.T)

    @property
    def is_later(self) -> Tensor:
        """Mask [N * d, N * d] bool: whether the level of the column comes after that of the row."""
        level = torch.arange(len(self.coupling), device=self.coupling.device) // self.rows.shape[2]
        return level[:, None] < level

    # Not under `torch.no_grad`: a decorated method of a tuple would stop torch.compile with fullgraph=True.
    def search(self, first: Tensor, num_quantizers: int, directions: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Choose a row of every level, one after the other, without gradients.

        Args:
            first: [M, n * d], latents of the first n levels before the rows of earlier levels are subtracted.
            num_quantizers: n.
            directions: normalised rows [d, V] of each level, `self.directions()` by default.

        Returns:
            Codes [n, M], latents [M, n * d].
        """
        dim, codes, latents = self.rows.shape[2], [], first.detach().clone()
        directions = directions or self.directions()
        rows, coupling = self.rows.detach().unbind(), self.coupling.detach().split(dim)
        width = num_quantizers * dim
        for level, end in enumerate(range(dim, width + 1, dim)):
            # The nearest of several unit vectors has the largest inner product; the latent's length does not matter.
            codes.append((latents[:, end - dim : end] @ directions[level]).argmax(dim=1))
            if end < width:
                row = rows[level].index_select(0, codes[-1])
                latents[:, end:].addmm_(row, coupling[level][:, end:width], alpha=-1)
        return torch.stack(codes), latents

    def directions(self) -> tuple[Tensor, ...]:
        """Return the rows normalised to length one, [d, V] per level, without gradients."""
        return F.normalize(self.rows.detach(), dim=-1).transpose(1, 2).contiguous().unbind()


class FoldedQuantizer:
    """A copy of the quantizer's current weights (see `LevelWeights`), for many calls without gradients.

    Args:
        device: where it computes, by default where the weights are. A model on several GPUs has its inputs elsewhere.
    """

    def __init__(self, quantizer: ResidualLFQ, device: torch.device | None = None) -> None:
        rows = cast(LFQ, quantizer.quantizers[0]).codebook  # its device is read after `fetched` has loaded its weight
        with torch.no_grad(), fetched(quantizer), torch.autocast(rows.weight.device.type, enabled=False):
            device = rows.weight.device if device is None else device
            self.project_in = folded(quantizer.input_proj).to(device)
            self.project_out = folded(quantizer.output_proj).to(device)
            self.weights = LevelWeights._make(weight.to(device) for weight in LevelWeights.of(quantizer))
            self.directions = self.weights.directions()

    @torch.no_grad()
    def encode(self, latent: Tensor, num_quantizers: int) -> Tensor:
        """Return the codes [num_quantizers, B, T] of the first levels for a latent [B, T, D]."""
        weights = self.weights
        width = num_quantizers * weights.rows.shape[2]
        with torch.autocast(latent.device.type, enabled=False):
            residual = self.project_in(latent.to(weights.rows.device, torch.float32)).flatten(0, 1)
            first = F.linear(residual, weights.in_weight[:width], weights.in_bias[:width])
            codes, _ = weights.search(first, num_quantizers, self.directions)
        return codes.unflatten(1, latent.shape[:2])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Map codes [n, B, T] of the first n levels -> [B, T, D] float32."""
        weights, count = self.weights, len(codes)
        _, size, dim = weights.rows.shape
        with torch.autocast(codes.device.type, enabled=False):
            offsets = torch.arange(0, count * size, size, device=codes.device)
            rows = F.embedding(codes.permute(1, 2, 0) + offsets, weights.rows.flatten(0, 1))  # [B, T, n, d]
            total = rows.flatten(2) @ weights.out_weight[: count * dim] + weights.out_bias[:count].sum(dim=0)
            return self.project_out(total)


@contextmanager
def fetched(module: nn.Module) -> Iterator[None]:
    """Load weights that accelerate has offloaded (`device_map`), which it does by itself only for `forward`."""
    hooked = [(part, hook) for part in module.modules() if (hook := getattr(part, "_hf_hook", None)) is not None]
    for part, hook in hooked:
        hook.pre_forward(part)
    try:
        yield
    finally:
        for part, hook in hooked:
            hook.post_forward(part, None)


def folded(module: Any) -> "FoldedProjection":
    """Return a 1x1 convolution (or identity) as a linear map, with its weight normalisation applied."""
    if isinstance(module, nn.Identity):
        return FoldedProjection(None, None)
    return FoldedProjection(module.weight[..., 0], module.bias)


class FoldedProjection(NamedTuple):
    """A linear map [.., C] -> [.., D], or identity without a weight."""

    weight: Tensor | None
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.weight is None else F.linear(x, self.weight, self.bias)

    def to(self, device: torch.device) -> "FoldedProjection":
        """Return the map on a device."""
        return FoldedProjection._make(None if part is None else part.to(device) for part in self)


class PointwiseConv1d(nn.Conv1d):
    """1x1 convolution that can be pickled although its weight is parametrized."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__(input_dim, output_dim, kernel_size=1)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle a call of `pointwise`: torch gives a parametrized module its own class, which pickle cannot find."""
        # The hooks of weight_norm are local functions, which cannot be pickled; the copy gets its own.
        state = {name: value for name, value in self.__dict__.items() if name != "_load_state_dict_pre_hooks"}
        return pointwise, (self.in_channels, self.out_channels), state


def pointwise(input_dim: int, output_dim: int) -> nn.Conv1d:
    """Build a weight-normalised 1x1 convolution; it is not an nn.Linear, to keep the released parameter names."""
    return weight_norm(PointwiseConv1d(input_dim, output_dim))


def stack_pointwise(modules: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Return the weights [N, out, in] and biases [N, out] of 1x1 convolutions of one size.

    Their weight normalisation is applied to all of them at once.
    """
    parts = [module.parametrizations.weight for module in modules]
    directions, gains = (torch.stack([getattr(part, name) for part in parts]) for name in ("original1", "original0"))
    weights = torch._weight_norm(directions.flatten(0, 1), gains.flatten(0, 1), 0).view(directions.shape)
    return weights[..., 0], torch.stack([module.bias for module in modules])


def apply_pointwise(module: Any, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution (or identity) to [B, T, C] without changing the layout."""
    if isinstance(module, nn.Identity):
        return x
    return F.linear(x, module.weight[..., 0], module.bias)
