"""Modules of encoder and decoder: patching, transformer stages between two projections, and their initial weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .accelerated_step import CastLinearOps, LinearOps, PrepackedLinearOps
from .attention import MultiheadAttention, Rotation, rotation
from .kv_cache import StageState, StreamChunk


class LayerScale(nn.Module):
    """Learned per-channel gain of a residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, channels: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.scale = nn.Parameter(torch.full((channels,), float(init)))

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        """Add a branch [B, T, D], multiplied by the gain, to the residual stream [B, T, D]."""
        if not residual.is_cuda:
            return torch.addcmul(residual, branch, self.scale)
        with torch.autocast("cuda", enabled=False):  # autocast would make and keep a float32 copy
            return torch.addcmul(residual, branch, self.scale)


class TransformerLayer(nn.Module):
    """LayerNorm -> attention -> LayerScale -> residual, then the same around a GELU feed-forward; no biases."""

    def __init__(self, d_model: int, num_heads: int, dim_feedforward: int, window: int, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model, eps=1e-5)
        self.self_attn = MultiheadAttention(d_model, num_heads, window)
        self.layer_scale_1 = LayerScale(d_model, layer_scale)
        self.norm2 = nn.LayerNorm(d_model, eps=1e-5)
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=False)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=False)
        self.layer_scale_2 = LayerScale(d_model, layer_scale)

    def forward(self, x: Tensor, rotation: Rotation, layer: int = 0, chunk: StreamChunk | None = None) -> Tensor:
        """Map [B, T, D] -> [B, T, D]; `layer` is its index in the stage, `chunk` the state of streams to continue."""
        if chunk is None:
            x = self.layer_scale_1(x, self.self_attn(self.norm1(x), rotation))
            return self.layer_scale_2(x, self.linear2(F.gelu(self.linear1(self.norm2(x)))))
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
        """Map [B, T, D] -> [B, T, D]; `state` continues streams, with `num_frames` [B] valid frames in this chunk."""
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
                x = layer(x, angles)  # without the number, so that a compiler makes one graph for all layers
        if chunk is not None:
            chunk.advance()
        return x


class ProjectedTransformer(nn.Module):
    """One stage: bias-free linear in, N layers, bias-free linear out; a projection between equal sizes is left out.

    Args:
        window: frames that each query attends to, itself included.
        layer_scale: initial gain of the residual branches.
        max_period: of the rotary embedding.
        frames_per_code_frame: frames that the stage processes per frame of codes.
        takes_audio, makes_audio: whether the linear in reads, or the linear out writes, samples of a waveform. That one
            computes in float32 even under autocast: bfloat16 limits a waveform to a signal-to-noise ratio of 55 dB.
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
        *,
        layer_scale: float = 0.01,
        max_period: float = 10000,
        frames_per_code_frame: int = 1,
        takes_audio: bool = False,
        makes_audio: bool = False,
    ) -> None:
        super().__init__()
        sizes = (d_model, num_heads, dim_feedforward, window, layer_scale)
        layers = [TransformerLayer(*sizes) for _ in range(num_layers)]
        self.window = window
        self.d_model = d_model
        self.frames_per_code_frame = frames_per_code_frame
        self.takes_audio = takes_audio
        self.makes_audio = makes_audio
        self.input_proj = projection(input_dimension, d_model)
        self.transformer = Transformer(layers, max_period)
        self.output_proj = projection(d_model, output_dimension)

    def forward(self, x: Tensor, state: StageState | None = None, num_frames: Tensor | None = None) -> Tensor:
        """Map [B, T, input_dimension] -> [B, T, output_dimension]."""
        linear = LinearOps() if state is None else state.linears
        with float32_math(self.input_proj, x, self.takes_audio) as precise:
            x = linear(self.input_proj, x.float() if precise else x)
        if state is None and torch.is_autocast_enabled(x.device.type):
            x = x.float()  # as after every layer, so that all layers compile to one graph
        x = self.transformer(x, state, num_frames)
        with float32_math(self.output_proj, x, self.makes_audio) as precise:
            return linear(self.output_proj, x.float() if precise else x)

    def new_state(
        self, batch_size: int, longest_step: int, dtype: torch.dtype | None = None, pack: bool = False
    ) -> StageState:
        """Return the empty streaming state for `batch_size` streams on the weights' device.

        Args:
            longest_step: frames that one attention call takes; longer chunks take several calls.
            dtype: of keys and values, by default that of the weights.
            pack: make reordered copies of the linear weights, for many short chunks (see `PrepackedLinearOps`).
        """
        layers = cast(list[TransformerLayer], list(self.transformer.layers))
        heads, weight = self.transformer.num_heads, next(self.transformer.parameters())
        device = device_of(self.transformer)
        shape = (batch_size, self.window + longest_step, 2 * heads, self.d_model // heads)
        rings = [weight.new_zeros(shape, dtype=dtype, device=device_of(layer)) for layer in layers]
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        linears = LinearOps()
        if dtype is not None and dtype != weight.dtype and not torch.is_grad_enabled():
            linears = CastLinearOps(self, dtype)
        elif pack:
            gains = {layer.self_attn.out_projs[0]: layer.layer_scale_1.scale for layer in layers}
            gains |= {layer.linear2: layer.layer_scale_2.scale for layer in layers}
            linears = PrepackedLinearOps(self, gains)
        return StageState(position, rings, self.window, linears)


@contextmanager
def float32_math(module: nn.Module, x: Tensor, wanted: bool) -> Iterator[bool]:
    """Switch autocast off, if wanted, for a module with float32 weights and its input; yields whether it did so."""
    weight = next(module.parameters(), None)
    if not wanted or weight is None or weight.dtype != torch.float32:
        yield False
        return
    with torch.autocast(x.device.type, enabled=False):
        yield True


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module computes: accelerate keeps offloaded weights on "meta" between calls."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((place for place in places if place is not None), device))


def projection(input_dimension: int, output_dimension: int) -> nn.Module:
    """Return a bias-free linear map, or identity where the sizes agree (as in the released model)."""
    if input_dimension == output_dimension:
        return nn.Identity()
    return nn.Linear(input_dimension, output_dimension, bias=False)


class PatchedPretransform(nn.Module):
    """Join (encoder) or split (decoder) `patch_size` consecutive frames: a reshape without parameters.

    Channel order is that of the released code: channel c, sample k of a patch become channel c * patch_size + k.
    """

    def __init__(self, patch_size: int, is_downsample: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.is_downsample = is_downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T * p, C] -> [B, T, C * p] when downsampling, the inverse otherwise."""
        batch, frames, channels = x.shape
        patch = self.patch_size
        if self.is_downsample:
            x = x.reshape(batch, frames // patch, patch, channels)
            return x.transpose(2, 3).reshape(batch, frames // patch, channels * patch)
        x = x.reshape(batch, frames, channels // patch, patch)
        return x.transpose(2, 3).reshape(batch, frames * patch, channels // patch)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, is_downsample={self.is_downsample}"


@torch.no_grad()
def initialize_weights(module: nn.Module) -> None:
    """Set a module's own parameters: Xavier linears, N(0, 1) codebooks, weight-norm gains equal to their norms.

    With the default of transformers (normal, 0.02) the model would be silent: every mel value would be below the log
    floor of the reconstruction loss, the gradient exactly zero, and no weight would ever change.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, LayerScale):
        nn.init.constant_(module.scale, module.init)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight)
    elif isinstance(module, nn.Conv1d):
        conv: Any = module
        weight = conv.parametrizations.weight
        nn.init.xavier_normal_(weight.original1)
        # transformers 5.0 also calls this after loading and protects loaded weights only in functions of torch.nn.init,
        # so a loaded gain is protected here.
        if not getattr(weight.original0, "_is_hf_initialized", False):
            weight.original0.copy_(weight.original1.flatten(1).norm(dim=1)[:, None, None])
        nn.init.zeros_(conv.bias)
