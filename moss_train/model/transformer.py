"""Pre-norm transformer stage between two linear projections."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import MultiheadAttention
from .cache import StageState, StreamChunk
from .packing import Linears, PackedLinears
from .rope import Rotation, rotation


class LayerScale(nn.Module):
    """Learned per-channel gain of a residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, channels: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.scale = nn.Parameter(torch.full((channels,), float(init)))

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        """Add a branch [B, T, D] with this gain to the residual stream [B, T, D]."""
        if not residual.is_cuda:
            return torch.addcmul(residual, branch, self.scale)
        with torch.autocast("cuda", enabled=False):  # it would make a float32 copy of the branch and keep it
            return torch.addcmul(residual, branch, self.scale)


class TransformerLayer(nn.Module):
    """LayerNorm -> attention -> LayerScale -> residual, then the same around a GELU feed-forward; no biases."""

    def __init__(
        self, d_model: int, num_heads: int, dim_feedforward: int, window: int, layer_scale: float, flash: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model, eps=1e-5)
        self.self_attn = MultiheadAttention(d_model, num_heads, window, flash)
        self.layer_scale_1 = LayerScale(d_model, layer_scale)
        self.norm2 = nn.LayerNorm(d_model, eps=1e-5)
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=False)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=False)
        self.layer_scale_2 = LayerScale(d_model, layer_scale)

    def forward(self, x: Tensor, rotation: Rotation, layer: int = 0, chunk: StreamChunk | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `layer` is its place in the stage, whose streams a `chunk` continues."""
        if chunk is not None:
            return self._continue(x, rotation, layer, chunk)
        x = self.layer_scale_1(x, self.self_attn(self.norm1(x), rotation))
        return self.layer_scale_2(x, self.linear2(F.gelu(self.linear1(self.norm2(x)))))

    def _continue(self, x: Tensor, rotation: Rotation, layer: int, chunk: StreamChunk) -> Tensor:
        linears = chunk.state.linears
        attended = self.self_attn.attend(self.norm1(x), rotation, layer, chunk)
        x = linears.add(self.self_attn.out_projs[0], attended, x, self.layer_scale_1)
        return linears.add(self.linear2, linears.gelu(self.linear1, self.norm2(x)), x, self.layer_scale_2)


class Transformer(nn.Module):
    """A stack of layers that share their rotation angles; no final norm."""

    def __init__(self, layers: list[TransformerLayer], max_period: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.num_heads = layers[0].self_attn.num_heads
        self.max_period = max_period
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, state: StageState | None = None, num_frames: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `state` continues streams, `num_frames` [B] are the valid frames of its chunk."""
        frames = x.shape[1]
        chunk = None if state is None else StreamChunk(state, frames, num_frames)
        positions = torch.arange(frames, device=x.device)[None] if chunk is None else chunk.positions
        angles = rotation(positions, x.shape[2] // self.num_heads, self.max_period)
        for number, layer in enumerate(self.layers):
            if chunk is not None:
                x = layer(x, angles, number, chunk)
            elif self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, angles, use_reentrant=False)
            else:
                x = layer(x, angles)  # without the number equal layers are one graph to a compiler
        if chunk is not None:
            chunk.finish()
        return x


class ProjectedTransformer(nn.Module):
    """One stage: bias-free linear in, N layers, bias-free linear out; a projection between equal sizes is left out.

    Args:
        window: frames each query may look back on, itself included.
        options: `layer_scale` (initial gain), `max_period` (of the rotary embedding), `flash` (see
            `MultiheadAttention`), `frames_per_code_frame`; the other keys of a released entry are fixed in Cat.
    """

    def __init__(
        self,
        input_dimension: int,
        output_dimension: int,
        d_model: int,
        num_heads: int,
        num_layers: int,
        dim_feedforward: int,
        window: int,
        **options: Any,
    ) -> None:
        super().__init__()
        sizes = (d_model, num_heads, dim_feedforward, window)
        variant = (options.get("layer_scale", 0.01), options.get("flash", True))
        layers = [TransformerLayer(*sizes, *variant) for _ in range(num_layers)]
        self.window = window
        self.d_model = d_model
        self.frames_per_code_frame = options.get("frames_per_code_frame", 1)
        self.input_proj = projection(input_dimension, d_model)
        self.transformer = Transformer(layers, options.get("max_period", 10000))
        self.output_proj = projection(d_model, output_dimension)

    def forward(self, x: Tensor, state: StageState | None = None, num_frames: Tensor | None = None) -> Tensor:
        """[B, T, input_dimension] -> [B, T, output_dimension]."""
        linear = Linears() if state is None else state.linears
        return linear(self.output_proj, self.transformer(linear(self.input_proj, x), state, num_frames))

    def new_state(
        self, batch_size: int, longest_step: int, dtype: torch.dtype | None = None, pack: bool = False
    ) -> StageState:
        """Empty streaming state for `batch_size` streams on the weights' device.

        Args:
            longest_step: frames that one attention call takes; longer chunks take several calls.
            dtype: of keys and values, by default that of the weights.
            pack: reorder the linear weights, as they are now, for many short chunks (see `PackedLinears`).
        """
        layers, heads = self.transformer.layers, self.transformer.num_heads
        weight = next(layers.parameters())
        shape = (batch_size, self.window + longest_step, 2 * heads, self.d_model // heads)
        rings = [weight.new_zeros(shape, dtype=dtype) for _ in layers]
        position = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return StageState(position, rings, self.window, self._packed_linears() if pack else Linears())

    def _packed_linears(self) -> PackedLinears:
        gains: dict[nn.Module, Tensor] = {}
        for layer in cast(list[TransformerLayer], list(self.transformer.layers)):
            gains[layer.self_attn.out_projs[0]] = layer.layer_scale_1.scale
            gains[layer.linear2] = layer.layer_scale_2.scale
        return PackedLinears(self, gains)


def projection(input_dimension: int, output_dimension: int) -> nn.Module:
    """Bias-free linear map, or identity where the sizes agree (as in the released model)."""
    if input_dimension == output_dimension:
        return nn.Identity()
    return nn.Linear(input_dimension, output_dimension, bias=False)
