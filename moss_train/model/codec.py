"""Base class of the model: encoder, quantizer and decoder on latents, for whole clips, streams, or clips in chunks.

Chunks bound the memory; each passes its state to the next one. The output classes of the public model come first.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .accelerated_step import FEWEST_ROWS, LARGEST_PACKED, LARGEST_ROWS
from .argument_checks import can_read
from .attention import HAS_WINDOW_KERNEL, LARGEST_BLOCK
from .configuration_moss_audio_tokenizer import ENTRY_SIZES, MossAudioTokenizerConfig
from .kv_cache import StageState
from .quantizer import FoldedQuantizer, ResidualLFQ
from .transformer import PatchedPretransform, ProjectedTransformer
from .waveforms import silence_beyond


@dataclass
class MossAudioTokenizerEncoderOutput(ModelOutput):
    """Result of `encode`.

    Attributes:
        audio_codes: [N, B, frames] int64, zero beyond an item's length.
        audio_codes_lengths: [B] int64, frames of each item; a partial last frame counts.
        encoder_hidden_states: [B, D, frames] latent before the quantizer.
    """

    audio_codes: Tensor | None = None
    audio_codes_lengths: Tensor | None = None
    encoder_hidden_states: Tensor | None = None


@dataclass
class MossAudioTokenizerDecoderOutput(ModelOutput):
    """Result of `decode`: audio [B, C, frames * upsample_rate] and audio_lengths [B] in samples."""

    audio: Tensor | None = None
    audio_lengths: Tensor | None = None


@dataclass
class MossAudioTokenizerOutput(ModelOutput):
    """Result of `forward`.

    Attributes:
        audio: reconstruction [B, C, T * output_ratio].
        audio_lengths: [B] valid samples of each item.
        audio_codes, audio_codes_lengths: [N, B, frames] and [B], as those of `encode`.
    """

    audio: Tensor | None = None
    audio_lengths: Tensor | None = None
    audio_codes: Tensor | None = None
    audio_codes_lengths: Tensor | None = None


COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Number = TypeVar("Number", int, Tensor)


class LatentCodec(PreTrainedModel):
    """Encoder, residual quantizer and decoder, differentiable, for audio that is a whole number of frames long.

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
    def dtype(self) -> torch.dtype:
        """Return the dtype of encoder and decoder; the quantizer, all that half a model has before them, is float32."""
        return next((self.decoder if self.part == "decoder" else self.encoder).parameters()).dtype

    @property
    def execution_device(self) -> torch.device:
        """Return the device that computes; accelerate may keep the weights elsewhere."""
        device = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        return self.device if device is None else torch.device(device)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Check transformers' `attn_implementation`, although Cat has a windowed attention of its own.

        "sdpa" uses torch's general kernels only, "flash_attention_2" the windowed kernel where device and dtype support
        it, and so does "eager", which transformers passes if nothing was chosen.
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
        """The dtype that the configuration sets for encoder and decoder; None for the weights' own dtype."""
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
        """Decode a quantized latent [B, F, D] to audio [B, C, F * upsample_rate]; arguments as in `encode_latent`."""
        self.check_part("decoder")
        with self._precision():
            x = run_stages(self.decoder, latent.to(self.dtype), states, num_frames, latent.shape[1])
        return x.reshape(x.shape[0], -1, self.config.number_channels).transpose(1, 2)

    def new_states(self, name: str, batch_size: int, chunk_frames: int) -> list[StageState]:
        """Return empty streaming states for the stages of "encoder" or "decoder".

        Args:
            chunk_frames: code frames per chunk that the KV caches are sized for; other numbers give the same result.
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
        """Return the number of code frames for a number of samples per channel; a partial last frame counts."""
        return -(-lengths // self.config.downsample_rate)

    def check_num_quantizers(self, num_quantizers: int | None) -> int:
        """Return the number of levels to use, all by default. Raises ValueError if the model has fewer."""
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
    """Build the modules of `encoder_kwargs` or `decoder_kwargs`; patches have an index, as in the released weights."""
    frames, windows = config.frames_per_code_frame(name), config.stage_windows(name)
    modules: list[nn.Module] = []
    for number, entry in enumerate(getattr(config, name)):
        if number not in frames:
            modules.append(PatchedPretransform(entry["patch_size"], is_downsample=name == "encoder_kwargs"))
            continue
        stage = ProjectedTransformer(
            **{key: entry[key] for key in ENTRY_SIZES},
            window=windows[number],
            layer_scale=entry.get("layer_scale", 0.01),
            max_period=entry.get("max_period", 10000),
            frames_per_code_frame=frames[number],
            takes_audio=name == "encoder_kwargs" and number == min(frames),
            makes_audio=name == "decoder_kwargs" and number == max(frames),
        )
        modules.append(stage)
    return nn.ModuleList(modules)


BLOCK_SECONDS = 30.0


def block_frames(codec: LatentCodec, chunk_frames: int | None, frames: int) -> int:
    """Return the code frames per block: the given chunk, the whole clip, or blocks of `BLOCK_SECONDS` of a long one."""
    longest = max(1, round(BLOCK_SECONDS * codec.config.frame_rate))
    if chunk_frames is None:
        return max(1, frames) if frames <= 2 * longest else longest
    return chunk_frames


def encode_chunked(
    codec: LatentCodec, audio: Tensor, lengths: Tensor, num_quantizers: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Encode the first `lengths` samples of each item of audio [B, C, T] to codes [N, B, F] and latent [B, F, D]."""
    batch, frames = audio.shape[0], codec.num_frames(audio.shape[2])
    block = block_frames(codec, chunk, frames)
    states = codec.new_states("encoder", batch, block) if block < frames else None
    quantizer = FoldedQuantizer(codec.quantizer, codec.execution_device)
    codes = torch.empty(num_quantizers, batch, frames, dtype=torch.int64, device=audio.device)
    latent = audio.new_empty(batch, 0, codec.config.quantizer_kwargs["input_dim"], dtype=codec.dtype)
    for start in range(0, frames, block):
        part = slice(start, min(start + block, frames))
        encoded = codec.encode_latent(complete_frames(audio, lengths, part, codec.config.downsample_rate), states)
        if start == 0:
            latent = encoded.new_empty(batch, frames, encoded.shape[2])
        latent[:, part] = encoded
        codes[:, :, part] = quantizer.encode(encoded, num_quantizers)
    return codes, latent


def encode_unbatched(
    codec: LatentCodec, clips: Sequence[Tensor], num_quantizers: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Apply `encode_chunked` to clips [1, C, T] one by one; the results are padded with zeros."""
    results = []
    for clip in clips:
        length = torch.full((1,), clip.shape[2], device=clip.device)
        results.append(encode_chunked(codec, clip, length, num_quantizers, chunk))
    longest = max(codes.shape[2] for codes, _ in results)
    codes = [F.pad(codes, (0, longest - codes.shape[2])) for codes, _ in results]
    latents = [F.pad(latent, (0, 0, 0, longest - latent.shape[1])) for _, latent in results]
    return torch.cat(codes, dim=1), torch.cat(latents)


def complete_frames(audio: Tensor, lengths: Tensor, frames: slice, hop: int) -> Tensor:
    """Return the given frames of audio [B, C, T] as [B, C, F * hop], with zeros beyond each item's length."""
    part = audio[..., frames.start * hop : frames.stop * hop]
    if can_read(lengths) and int(lengths.min()) >= frames.stop * hop:
        return part
    part = silence_beyond(part, lengths - frames.start * hop)
    return F.pad(part, (0, (frames.stop - frames.start) * hop - part.shape[2]))


def decode_chunked(codec: LatentCodec, codes: Tensor, chunk: int | None) -> Tensor:
    """Return the audio [B, C, F * hop] of codes [n, B, F]."""
    batch, frames, hop = codes.shape[1], codes.shape[2], codec.config.upsample_rate
    block = block_frames(codec, chunk, frames)
    states = codec.new_states("decoder", batch, block) if block < frames else None
    quantizer = FoldedQuantizer(codec.quantizer, codec.execution_device)
    audio = torch.empty(batch, codec.config.number_channels, 0, dtype=codec.dtype, device=codes.device)
    for start in range(0, frames, block):
        stop = min(start + block, frames)
        decoded = codec.decode_latent(quantizer.decode(codes[:, :, start:stop]), states)
        if start == 0:
            audio = decoded.new_empty(*decoded.shape[:2], frames * hop)
        audio[..., start * hop : stop * hop] = decoded
    return audio


def decode_unbatched(codec: LatentCodec, clips: Sequence[Tensor], chunk: int | None) -> Tensor:
    """Apply `decode_chunked` to codes [n, 1, F] one by one; the results are padded with zeros."""
    results = [decode_chunked(codec, codes, chunk) for codes in clips]
    longest = max(audio.shape[2] for audio in results)
    return torch.cat([F.pad(audio, (0, longest - audio.shape[2])) for audio in results])
