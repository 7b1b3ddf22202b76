"""Base class of the model: encoder, quantizer and decoder on latent sequences, in one pass or as a stream."""

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import LARGEST_BLOCK
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
        self.encoder = build_modules(config, "encoder_kwargs")
        self.quantizer = ResidualLFQ(**config.quantizer_kwargs)
        self.decoder = build_modules(config, "decoder_kwargs")

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What encoder and decoder compute in by configuration; None for the weights' own dtype."""
        return COMPUTE_DTYPES.get(getattr(self.config, "compute_dtype", None) or "fp32")

    def _precision(self) -> AbstractContextManager:
        dtype = self.compute_dtype
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def encode_latent(
        self, audio: Tensor, states: list[StageState] | None = None, num_frames: Tensor | None = None
    ) -> Tensor:
        """Encode audio [B, C, F * hop] to a latent [B, F, D].

        Args:
            states: from `new_states("encoder", ...)`, to continue streams; None for clips from their first sample.
            num_frames: [B] valid code frames of each item, None when all are.
        """
        frames = audio.shape[2] // self.config.downsample_rate
        # Channels are interleaved in time: L0 R0 L1 R1 ...
        x = audio.to(self.dtype).transpose(1, 2).reshape(audio.shape[0], -1, 1)
        with self._precision():
            return run_stages(self.encoder, x, states, num_frames, frames)

    def decode_latent(
        self, latent: Tensor, states: list[StageState] | None = None, num_frames: Tensor | None = None
    ) -> Tensor:
        """Decode a quantized latent [B, F, D] to audio [B, C, F * hop]; arguments as in `encode_latent`."""
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
    flash = getattr(config, "attention_implementation", None) != "sdpa"
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
            flash=flash,
            frames_per_code_frame=frames[number],
        )
        modules.append(stage)
    return nn.ModuleList(modules)
