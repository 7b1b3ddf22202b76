"""Cat: causal audio tokenizer with transformer (arXiv 2602.10934), the public model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .cache import StageState
from .configuration_moss_audio_tokenizer import MossAudioTokenizerConfig
from .initialization import initialize_weights
from .patching import PatchedPretransform
from .quantizer import ResidualLFQ
from .streaming import MossAudioTokenizerStream, run_stages
from .transformer import ProjectedTransformer

OLDER_WEIGHT_NAMES = {
    r"self_attn\.in_proj_weight$": "self_attn.in_projs.0.weight",
    r"self_attn\.out_proj\.weight$": "self_attn.out_projs.0.weight",
}
BLOCK_SECONDS = 30.0


@dataclass
class MossAudioTokenizerEncoderOutput(ModelOutput):
    """Result of `encode`.

    Attributes:
        audio_codes: [N, B, frames] int64, zero beyond an item's length.
        audio_codes_lengths: [B] int64, frames of each item; a started frame counts.
        encoder_hidden_states: [B, D, frames] latent before the quantizer.
    """

    audio_codes: Tensor | None = None
    audio_codes_lengths: Tensor | None = None
    encoder_hidden_states: Tensor | None = None


@dataclass
class MossAudioTokenizerDecoderOutput(ModelOutput):
    """Result of `decode`: audio [B, C, frames * downsample_rate] and audio_lengths [B] in samples."""

    audio: Tensor | None = None
    audio_lengths: Tensor | None = None


@dataclass
class MossAudioTokenizerOutput(ModelOutput):
    """Result of `forward`: reconstruction [B, C, T], its lengths [B], codes [N, B, frames] and their lengths [B]."""

    audio: Tensor | None = None
    audio_lengths: Tensor | None = None
    audio_codes: Tensor | None = None
    audio_codes_lengths: Tensor | None = None


class MossAudioTokenizerModel(PreTrainedModel):
    """Encoder, residual quantizer and decoder, with the interface of the released model.

    One deliberate difference: lengths count a started frame, zero-padded (the released code drops it).
    `encode` and `decode` run without gradients; `forward` is differentiable.
    """

    config_class = MossAudioTokenizerConfig
    base_model_prefix = "moss_audio_tokenizer"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerLayer"]
    _keep_in_fp32_modules_strict = ["quantizer"]

    def __init__(self, config: MossAudioTokenizerConfig) -> None:
        super().__init__(config)
        if not config.encoder_kwargs:
            raise ValueError("the configuration has no encoder_kwargs; build it from a config.json or from_stages()")
        self.encoder = build_modules(config, config.encoder_kwargs, is_encoder=True)
        self.quantizer = ResidualLFQ(**config.quantizer_kwargs)
        self.decoder = build_modules(config, config.decoder_kwargs, is_encoder=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialize_weights(module)

    @property
    def sampling_rate(self) -> int:
        """Of the waveform, in Hz."""
        return self.config.sampling_rate

    # Pieces that training puts together, differentiable.

    def encode_latent(
        self, audio: Tensor, states: list[StageState] | None = None, num_frames: Tensor | None = None
    ) -> Tensor:
        """Audio [B, C, F * hop] -> latent [B, F, D]; `states` continue streams (see `stream`)."""
        frames = audio.shape[2] // self.config.downsample_rate
        # Channels are interleaved in time: L0 R0 L1 R1 ...
        x = audio.to(self.dtype).transpose(1, 2).reshape(audio.shape[0], -1, 1)
        return run_stages(self.encoder, x, states, num_frames, frames)

    def decode_latent(
        self, latent: Tensor, states: list[StageState] | None = None, num_frames: Tensor | None = None
    ) -> Tensor:
        """Quantized latent [B, F, D] -> audio [B, C, F * hop]."""
        x = run_stages(self.decoder, latent.to(self.dtype), states, num_frames, latent.shape[1])
        return x.reshape(x.shape[0], -1, self.config.number_channels).transpose(1, 2)

    def forward(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        return_dict: bool | None = None,
    ) -> MossAudioTokenizerOutput | tuple[Tensor, ...]:
        """Encode, quantize with the first `num_quantizers` levels and decode, with gradients; see `encode`."""
        audio, lengths = self._prepare_audio(input_values, padding_mask)
        levels = torch.full((audio.shape[0],), self.check_num_quantizers(num_quantizers), device=audio.device)
        quantizer_output = self.quantizer(self.encode_latent(audio), levels)
        reconstruction = self.decode_latent(quantizer_output.quantized)
        output = MossAudioTokenizerOutput(
            audio=reconstruction[..., : input_values.shape[-1]],
            audio_lengths=lengths,
            audio_codes=quantizer_output.codes[: int(levels[0])],
            audio_codes_lengths=self.num_frames(lengths),
        )
        return output if return_dict is not False else output.to_tuple()

    @torch.no_grad()
    def encode(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        return_dict: bool | None = None,
        chunk_duration: float | None = None,
    ) -> MossAudioTokenizerEncoderOutput | tuple[Tensor, ...]:
        """Codes of a batch of waveforms.

        Args:
            input_values: [B, C, T] or [B, T] samples at `sampling_rate`.
            padding_mask: [B, T], true for real samples; padding stands at the end.
            num_quantizers: levels to compute, all by default.
            chunk_duration: seconds per chunk, a whole number of frames; the result is that of the whole clip.

        Raises:
            ValueError: an illegal shape, `num_quantizers` or `chunk_duration`.
        """
        levels = self.check_num_quantizers(num_quantizers)
        chunk_frames = self._chunk_frames(chunk_duration)
        audio, lengths = self._prepare_audio(input_values, padding_mask)
        latent = self._encode_in_blocks(audio, chunk_frames)
        frames = self.num_frames(lengths)
        valid = torch.arange(latent.shape[1], device=latent.device) < frames[:, None]
        output = MossAudioTokenizerEncoderOutput(
            audio_codes=self.quantizer.encode(latent, levels) * valid,
            audio_codes_lengths=frames,
            encoder_hidden_states=latent.transpose(1, 2),
        )
        return output if return_dict is not False else output.to_tuple()

    @torch.no_grad()
    def decode(
        self,
        audio_codes: Tensor,
        padding_mask: Tensor | None = None,
        return_dict: bool | None = None,
        chunk_duration: float | None = None,
        num_quantizers: int | None = None,
    ) -> MossAudioTokenizerDecoderOutput | tuple[Tensor, ...]:
        """Waveforms of codes [n, B, frames] of the first n levels (or [n, frames] of one clip).

        Args:
            padding_mask: [B, frames], true for real frames; gives `audio_lengths`.
            chunk_duration: as in `encode`.
            num_quantizers: use only so many of the given levels.

        Raises:
            ValueError: codes out of range, too many levels, or an illegal `chunk_duration`.
        """
        chunk_frames = self._chunk_frames(chunk_duration)
        codes = audio_codes[:, None] if audio_codes.ndim == 2 else audio_codes
        codes = codes[:num_quantizers].to(self.device)
        self.check_codes(codes)
        frames = codes.new_full(codes.shape[1:2], codes.shape[2]) if padding_mask is None else padding_mask.sum(-1)
        output = MossAudioTokenizerDecoderOutput(
            audio=self._decode_in_blocks(codes, chunk_frames),
            audio_lengths=frames * self.config.downsample_rate,
        )
        return output if return_dict is not False else output.to_tuple()

    def batch_encode(self, waveforms: Sequence[Tensor], **options: Any) -> MossAudioTokenizerEncoderOutput:
        """`encode` for a list of waveforms [C, T] or [T] of different lengths."""
        clips = [clip if clip.ndim == 2 else clip[None] for clip in waveforms]
        longest = max(clip.shape[-1] for clip in clips)
        audio = torch.stack([F.pad(clip, (0, longest - clip.shape[-1])) for clip in clips])
        lengths = torch.tensor([clip.shape[-1] for clip in clips])
        return self.encode(audio, torch.arange(longest) < lengths[:, None], **options)

    def batch_decode(self, codes: Sequence[Tensor], **options: Any) -> MossAudioTokenizerDecoderOutput:
        """`decode` for a list of codes [n, frames] of different lengths."""
        longest = max(item.shape[-1] for item in codes)
        padded = torch.stack([F.pad(item, (0, longest - item.shape[-1])) for item in codes], dim=1)
        lengths = torch.tensor([item.shape[-1] for item in codes], device=padded.device)
        return self.decode(padded, torch.arange(longest, device=padded.device) < lengths[:, None], **options)

    def stream(self, batch_size: int = 1, num_quantizers: int | None = None) -> MossAudioTokenizerStream:
        """State for `batch_size` streams that are encoded or decoded chunk by chunk."""
        return MossAudioTokenizerStream(self, batch_size, num_quantizers)

    @staticmethod
    def stages(modules: nn.ModuleList) -> list[ProjectedTransformer]:
        """The transformer stages of an encoder or decoder."""
        return [module for module in modules if isinstance(module, ProjectedTransformer)]

    def num_frames(self, lengths: Tensor | int) -> Tensor | int:
        """Frames of codes for a number of samples per channel; a started frame counts."""
        return -(-lengths // self.config.downsample_rate)

    def check_num_quantizers(self, num_quantizers: int | None) -> int:
        """The number of levels to use, all by default; ValueError when there are not so many."""
        available = self.config.num_quantizers
        if num_quantizers is None:
            return available
        if not 1 <= num_quantizers <= available:
            raise ValueError(f"num_quantizers must be between 1 and {available}, got {num_quantizers}")
        return num_quantizers

    def check_audio(self, audio: Tensor) -> Tensor:
        """Bring [B, T] (mono) or [B, C, T] to [B, C, T]; ValueError for anything else."""
        channels = self.config.number_channels
        if audio.ndim == 2 and channels == 1:
            audio = audio[:, None]
        if audio.ndim != 3 or audio.shape[1] != channels:
            raise ValueError(f"expected audio [B, {channels}, T], got shape {tuple(audio.shape)}")
        return audio

    def check_codes(self, codes: Tensor) -> None:
        """Raise ValueError unless codes are [n, B, frames] integers of this model."""
        levels, size = self.config.num_quantizers, self.config.quantizer_kwargs["codebook_size"]
        if codes.ndim != 3 or not 1 <= codes.shape[0] <= levels or codes.is_floating_point():
            raise ValueError(f"expected integer codes [1..{levels}, B, frames], got {codes.dtype} {tuple(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise ValueError(f"codes must lie in 0..{size - 1}, got {int(codes.min())}..{int(codes.max())}")

    def _prepare_audio(self, audio: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Audio padded to whole frames [B, C, F * hop], silent beyond each length, and lengths [B] in samples."""
        audio = self.check_audio(audio).to(self.device)
        if audio.shape[2] == 0:
            raise ValueError("the audio has no samples")
        lengths = torch.full(audio.shape[:1], audio.shape[2], device=audio.device)
        if padding_mask is not None:
            mask = padding_mask.reshape(audio.shape[0], -1).to(audio.device, torch.bool)
            lengths = mask.sum(dim=-1)
            audio = audio * mask[:, None]
        return F.pad(audio, (0, -audio.shape[2] % self.config.downsample_rate)), lengths

    def _chunk_frames(self, chunk_duration: float | None) -> int | None:
        if chunk_duration is None:
            return None
        longest = self.config.causal_transformer_context_duration
        frames = chunk_duration * self.config.frame_rate
        if not 0 < chunk_duration <= longest:
            raise ValueError(f"chunk_duration must be above 0 and at most {longest} s, got {chunk_duration}")
        if round(frames) < 1 or not math.isclose(frames, round(frames), rel_tol=0, abs_tol=1e-6):
            raise ValueError(
                f"chunk_duration must be a whole number of frames of {1 / self.config.frame_rate:g} s, "
                f"got {chunk_duration}"
            )
        return round(frames)

    def _block_frames(self, chunk_frames: int | None, frames: int) -> int | None:
        """Frames per block: the wanted chunk, or bounded blocks for long audio, or None for one pass."""
        longest = round(BLOCK_SECONDS * self.config.frame_rate)
        if chunk_frames is None and frames <= 2 * longest:
            return None
        return chunk_frames or longest

    def _encode_in_blocks(self, audio: Tensor, chunk_frames: int | None) -> Tensor:
        hop = self.config.downsample_rate
        block = self._block_frames(chunk_frames, audio.shape[2] // hop)
        if block is None:
            return self.encode_latent(audio)
        states = [stage.new_state(audio.shape[0]) for stage in self.stages(self.encoder)]
        return torch.cat([self.encode_latent(part, states) for part in audio.split(block * hop, dim=2)], dim=1)

    def _decode_in_blocks(self, codes: Tensor, chunk_frames: int | None) -> Tensor:
        block = self._block_frames(chunk_frames, codes.shape[2])
        if block is None:
            return self.decode_latent(self.quantizer.decode(codes))
        states = [stage.new_state(codes.shape[1]) for stage in self.stages(self.decoder)]
        parts = codes.split(block, dim=2)
        return torch.cat([self.decode_latent(self.quantizer.decode(part), states) for part in parts], dim=2)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a folder or repository in the released layout; a missing or left-over weight is a ValueError."""
        kwargs.setdefault("key_mapping", OLDER_WEIGHT_NAMES)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        problems = {kind: sorted(map(str, info[kind])) for kind in info if info[kind]}
        if problems:
            details = "; ".join(f"{kind}: {', '.join(names[:5])} ({len(names)})" for kind, names in problems.items())
            raise ValueError(f"the weights do not fit the configuration: {details}")
        # Renaming on load would be undone on save; the names written are always the released ones.
        model._weight_conversions = None
        return (model, info) if output_loading_info else model


def build_modules(
    config: MossAudioTokenizerConfig, entries: Sequence[Mapping[str, Any]], is_encoder: bool
) -> nn.ModuleList:
    """Modules of an encoder or decoder, indexed as in the released weights (patch modules count)."""
    rate = config.sampling_rate * config.number_channels if is_encoder else config.frame_rate
    modules: list[nn.Module] = []
    for entry in entries:
        options = {key: value for key, value in entry.items() if key != "module_type"}
        if entry["module_type"] == "PatchedPretransform":
            rate = rate / entry["patch_size"] if is_encoder else rate * entry["patch_size"]
            modules.append(PatchedPretransform(entry["patch_size"], is_downsample=is_encoder))
        else:
            seconds = options.pop("context_duration", config.causal_transformer_context_duration)
            # The small constant keeps 12.5 x 10 from becoming 124 through float rounding of the rate.
            modules.append(ProjectedTransformer(window=int(rate * seconds + 1e-6), **options))
    return nn.ModuleList(modules)
