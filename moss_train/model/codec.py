"""Base class of the model: encoder, quantizer and decoder on latent sequences, in one pass or as a stream."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import HAS_WINDOW_KERNEL, LARGEST_BLOCK
from .configuration_moss_audio_tokenizer import MossAudioTokenizerConfig
from .kv_cache import StageState
from .prepacked_linear import FEWEST_ROWS, LARGEST_PACKED, LARGEST_ROWS
from .quantizer import ResidualLFQ
from .transformer import PatchedPretransform, ProjectedTransformer

STAGE_SIZES = ("input_dimension", "output_dimension", "d_model", "num_heads", "num_layers", "dim_feedforward")
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Number = TypeVar("Number", int, Tensor)


class LatentCodec(PreTrainedModel):
    """Encoder, residual quantizer and decoder, differentiable, for audio of whole frames.

    Chunked and streaming code use this interface; `MossAudioTokenizerModel` adds the public one.
    """

    config_class = MossAudioTokenizerConfig
    config: MossAudioTokenizerConfig

    def __init__(self, config: MossAudioTokenizerConfig) -> None:
        super().__init__(config)
        if not config.encoder_kwargs:
            raise ValueError("the configuration has no encoder_kwargs; build it from a config.json or from_stages()")
        self.encoder = build_modules(config, "encoder_kwargs") if self.part != "decoder" else nn.ModuleList()
        self.quantizer = ResidualLFQ(**config.quantizer_kwargs)
        self.decoder = build_modules(config, "decoder_kwargs") if self.part != "encoder" else nn.ModuleList()
        if self.part is not None:
            other = "decoder" if self.part == "encoder" else "encoder"
            self._keys_to_ignore_on_load_unexpected = [rf"^{other}\."]
        self.warned: set[str] = set()  # kinds of warnings that are given once per model
        self._set_flash(config._attn_implementation)

    @property
    def part(self) -> str | None:
        """Return "encoder" or "decoder" for half a model, which has the quantizer too; None for a complete one."""
        return getattr(self.config, "part", None)

    def check_part(self, name: str) -> None:
        """Raise ValueError unless the model has its "encoder" or "decoder"."""
        if self.part not in (None, name):
            raise ValueError(f"this model has no {name}: it was loaded or exported with part={self.part!r}")

    @property
    def execution_device(self) -> torch.device:
        """Return the device that computes; accelerate may keep the weights elsewhere."""
        device = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        return self.device if device is None else torch.device(device)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Check transformers' `attn_implementation`: Cat's windowed attention is its own, not one of its functions.

        "sdpa" uses torch's general kernels only, "flash_attention_2" the windowed kernel where device and dtype have
        it, as does "eager", the name that transformers gives to no choice.
        """
        if attn_implementation == "flash_attention_2" and not HAS_WINDOW_KERNEL:
            raise ValueError(
                "attn_implementation='flash_attention_2' needs a torch with windowed varlen_attn; use 'sdpa'"
            )
        if attn_implementation not in (None, "eager", "sdpa", "flash_attention_2"):
            raise ValueError(f"attn_implementation={attn_implementation!r} is not one of sdpa, flash_attention_2")
        return attn_implementation or "eager"

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Change the attention kernels to "sdpa" or "flash_attention_2"."""
        self.config._attn_implementation = self._check_and_adjust_attn_implementation(attn_implementation)
        self._set_flash(attn_implementation)

    def _set_flash(self, attn_implementation: str | None) -> None:
        flash = "sdpa" not in (attn_implementation, getattr(self.config, "attention_implementation", None))
        for stage in (*self.stages(self.encoder), *self.stages(self.decoder)):
            for layer in stage.transformer.layers:
                attention: Any = layer.self_attn
                attention.flash = flash

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What encoder and decoder compute in by configuration; None for the weights' own dtype."""
        return COMPUTE_DTYPES.get(getattr(self.config, "compute_dtype", None) or "fp32")

    def _precision(self) -> AbstractContextManager:
        dtype = self.compute_dtype
        return nullcontext() if dtype is None else torch.autocast(self.execution_device.type, dtype)

    def encode_latent(
        self, audio: Tensor, states: list[StageState] | None = None, num_frames: Tensor | None = None
    ) -> Tensor:
        """Encode audio [B, C, F * hop] to a latent [B, F, D].

        Args:
            states: from `new_states("encoder", ...)`, to continue streams; None for clips from their first sample.
            num_frames: [B] valid code frames of each item, None when all are.
        """
        self.check_part("encoder")
        frames = audio.shape[2] // self.config.downsample_rate
        # Channels are interleaved in time: L0 R0 L1 R1 ...
        x = audio.to(self.dtype).transpose(1, 2).reshape(audio.shape[0], -1, 1)
        with self._precision():
            return run_stages(self.encoder, x, states, num_frames, frames)

    def decode_latent(
        self, latent: Tensor, states: list[StageState] | None = None, num_frames: Tensor | None = None
    ) -> Tensor:
        """Decode a quantized latent [B, F, D] to audio [B, C, F * hop]; arguments as in `encode_latent`."""
        self.check_part("decoder")
        with self._precision():
            x = run_stages(self.decoder, latent.to(self.dtype), states, num_frames, latent.shape[1])
        return x.reshape(x.shape[0], -1, self.config.number_channels).transpose(1, 2)

    def new_states(self, name: str, batch_size: int, chunk_frames: int) -> list[StageState]:
        """Return empty streaming states for the stages of "encoder" or "decoder".

        Args:
            chunk_frames: code frames per chunk for which the rings are sized; any other number is exact too.
        """
        part = getattr(self, name)
        nbytes = sum(parameter.nbytes for parameter in part.parameters())
        states = []
        for stage in self.stages(part):
            frames = chunk_frames * stage.frames_per_code_frame
            pack = nbytes <= LARGEST_PACKED and FEWEST_ROWS <= batch_size * frames <= LARGEST_ROWS
            states.append(stage.new_state(batch_size, min(frames, LARGEST_BLOCK), self.compute_dtype, pack))
        return states

    @staticmethod
    def stages(modules: nn.ModuleList) -> list[ProjectedTransformer]:
        """Return the transformer stages of an encoder or decoder."""
        return [module for module in modules if isinstance(module, ProjectedTransformer)]

    def num_frames(self, lengths: Number) -> Number:
        """Return the frames of codes for a number of samples per channel; a started frame counts."""
        return -(-lengths // self.config.downsample_rate)

    def check_num_quantizers(self, num_quantizers: int | None) -> int:
        """Return the number of levels to use, all by default; ValueError when there are not so many."""
        available = self.config.num_quantizers
        if num_quantizers is None:
            return available
        if not 1 <= num_quantizers <= available:
            raise ValueError(f"num_quantizers must be between 1 and {available}, got {num_quantizers}")
        return num_quantizers


def run_stages(
    modules: nn.ModuleList, x: Tensor, states: list[StageState] | None, num_frames: Tensor | None, frames: int
) -> Tensor:
    """Pass [B, T, C] through patch modules and transformer stages, with streaming states when given.

    Args:
        num_frames: [B] valid code frames of each item, None when all `frames` are valid.
        frames: code frames in `x`, from which each stage's own rate follows.
    """
    remaining = iter(states or ())
    for module in modules:
        if not hasattr(module, "transformer") or states is None:
            x = module(x)
        else:
            valid = None if num_frames is None else num_frames * (x.shape[1] // frames)
            x = module(x, next(remaining), valid)
    return x


def build_modules(config: MossAudioTokenizerConfig, name: str) -> nn.ModuleList:
    """Build the modules of `encoder_kwargs` or `decoder_kwargs`; patch modules count, as in the released weights."""
    frames, windows = config.frames_per_code_frame(name), config.stage_windows(name)
    modules: list[nn.Module] = []
    for number, entry in enumerate(getattr(config, name)):
        if number not in frames:
            modules.append(PatchedPretransform(entry["patch_size"], is_downsample=name == "encoder_kwargs"))
            continue
        stage = ProjectedTransformer(
            **{key: entry[key] for key in STAGE_SIZES},
            window=windows[number],
            layer_scale=entry.get("layer_scale", 0.01),
            max_period=entry.get("max_period", 10000),
            frames_per_code_frame=frames[number],
            takes_audio=name == "encoder_kwargs" and number == min(frames),
            makes_audio=name == "decoder_kwargs" and number == max(frames),
        )
        modules.append(stage)
    return nn.ModuleList(modules)
