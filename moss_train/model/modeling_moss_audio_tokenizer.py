"""Cat: causal audio tokenizer with transformer (arXiv 2602.10934), the public model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architecture import frames_per_code_frame, stage_windows
from .cache import StageState
from .configuration_moss_audio_tokenizer import MossAudioTokenizerConfig
from .continuous import ContinuousDecoder
from .initialization import initialize_weights
from .inputs import check_audio, check_codes, chunk_frames, pad_together, valid_lengths
from .outputs import MossAudioTokenizerDecoderOutput, MossAudioTokenizerEncoderOutput, MossAudioTokenizerOutput
from .passes import decode_each, decode_in_blocks, encode_each, encode_in_blocks, run_stages, whole_frames
from .patching import PatchedPretransform
from .quantizer import ResidualLFQ
from .streaming import MossAudioTokenizerStream
from .transformer import ProjectedTransformer

OLDER_WEIGHT_NAMES = {
    r"self_attn\.in_proj_weight$": "self_attn.in_projs.0.weight",
    r"self_attn\.out_proj\.weight$": "self_attn.out_projs.0.weight",
}
Number = TypeVar("Number", int, Tensor)
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class MossAudioTokenizerModel(PreTrainedModel):
    """Encoder, residual quantizer and decoder, with the interface of the released model.

    One deliberate difference: lengths count a started frame, zero-padded (the released code drops it).
    `encode` and `decode` run without gradients; `forward` is differentiable.
    """

    config_class = MossAudioTokenizerConfig
    base_model_prefix = "moss_audio_tokenizer"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["quantizer"]  # noqa: RUF012
    config: MossAudioTokenizerConfig

    def __init__(self, config: MossAudioTokenizerConfig) -> None:
        super().__init__(config)
        if not config.encoder_kwargs:
            raise ValueError("the configuration has no encoder_kwargs; build it from a config.json or from_stages()")
        self.encoder = build_modules(config, "encoder_kwargs")
        self.quantizer = ResidualLFQ(**config.quantizer_kwargs)
        self.decoder = build_modules(config, "decoder_kwargs")
        self._continuous_decoder: ContinuousDecoder | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialize_weights(module)

    @property
    def sampling_rate(self) -> int:
        """Of the waveform, in Hz."""
        return self.config.sampling_rate

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What encoder and decoder compute in by configuration; None for the weights' own dtype."""
        return COMPUTE_DTYPES.get(getattr(self.config, "compute_dtype", None) or "fp32")

    def _precision(self) -> AbstractContextManager:
        dtype = self.compute_dtype
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    # Pieces that training puts together, differentiable.

    def encode_latent(
        self, audio: Tensor, states: list[StageState] | None = None, num_frames: Tensor | None = None
    ) -> Tensor:
        """Audio [B, C, F * hop] -> latent [B, F, D]; `states` continue streams (see `stream`)."""
        frames = audio.shape[2] // self.config.downsample_rate
        # Channels are interleaved in time: L0 R0 L1 R1 ...
        x = audio.to(self.dtype).transpose(1, 2).reshape(audio.shape[0], -1, 1)
        with self._precision():
            return run_stages(self.encoder, x, states, num_frames, frames)

    def decode_latent(
        self, latent: Tensor, states: list[StageState] | None = None, num_frames: Tensor | None = None
    ) -> Tensor:
        """Quantized latent [B, F, D] -> audio [B, C, F * hop]."""
        with self._precision():
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
        levels = self.check_num_quantizers(num_quantizers)
        audio, lengths = self._prepare_audio(input_values, padding_mask)
        audio = whole_frames(audio, lengths, slice(0, self.num_frames(audio.shape[2])), self.config.downsample_rate)
        used = torch.full((audio.shape[0],), levels, device=audio.device)
        quantizer_output = self.quantizer(self.encode_latent(audio), used)
        reconstruction = self.decode_latent(quantizer_output.quantized)
        output = MossAudioTokenizerOutput(
            audio=reconstruction[..., : input_values.shape[-1]],
            audio_lengths=lengths,
            audio_codes=quantizer_output.codes[:levels],
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
        batch_invariant: bool = False,
    ) -> MossAudioTokenizerEncoderOutput | tuple[Tensor, ...]:
        """Codes of a batch of waveforms.

        Args:
            input_values: [B, C, T] or [B, T] samples at `sampling_rate`.
            padding_mask: [B, T], true for real samples; padding stands at the end.
            num_quantizers: levels to compute, all by default.
            chunk_duration: seconds per chunk, a whole number of frames; the result is that of the whole clip.
            batch_invariant: codes do not depend, to the last bit, on what a clip is batched with or padded to: each
                clip passes alone and unpadded, which costs the speed-up of batching.

        Raises:
            ValueError: an illegal shape, `num_quantizers` or `chunk_duration`.
        """
        levels = self.check_num_quantizers(num_quantizers)
        chunk = chunk_frames(self.config, chunk_duration)
        audio, lengths = self._prepare_audio(input_values, padding_mask)
        frames = self.num_frames(lengths)
        if batch_invariant:
            clips = [clip[None, :, :length] for clip, length in zip(audio, lengths.tolist(), strict=True)]
            codes, latent = encode_each(self, clips, levels, chunk)
        else:
            codes, latent = encode_in_blocks(self, audio, lengths, levels, chunk)
        codes *= torch.arange(codes.shape[2], device=codes.device) < frames[:, None]
        output = MossAudioTokenizerEncoderOutput(
            audio_codes=codes, audio_codes_lengths=frames, encoder_hidden_states=latent.transpose(1, 2)
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
        batch_invariant: bool = False,
    ) -> MossAudioTokenizerDecoderOutput | tuple[Tensor, ...]:
        """Waveforms of codes [n, B, frames] of the first n levels (or [n, frames] of one clip).

        Args:
            padding_mask: [B, frames], true for real frames; gives `audio_lengths`.
            chunk_duration, batch_invariant: as in `encode`.
            num_quantizers: use only so many of the given levels.

        Raises:
            ValueError: codes out of range, too many levels, or an illegal `chunk_duration`.
        """
        chunk = chunk_frames(self.config, chunk_duration)
        codes = audio_codes[:, None] if audio_codes.ndim == 2 else audio_codes
        check_codes(self.config, codes)
        codes = codes[: self.check_num_quantizers(num_quantizers)].to(self.device, torch.int64)
        frames = valid_lengths(padding_mask, codes.shape[1], codes.shape[2], codes.device)
        if batch_invariant:
            clips = [codes[:, item : item + 1, :count] for item, count in enumerate(frames.tolist())]
            audio = decode_each(self, clips, chunk)
        else:
            audio = decode_in_blocks(self, codes, chunk)
        output = MossAudioTokenizerDecoderOutput(audio=audio, audio_lengths=frames * self.config.downsample_rate)
        return output if return_dict is not False else output.to_tuple()

    def batch_encode(self, waveforms: Sequence[Tensor], **options: Any) -> Any:
        """`encode` for a list of waveforms [C, T] or [T] of different lengths."""
        return self.encode(*pad_together([clip if clip.ndim == 2 else clip[None] for clip in waveforms]), **options)

    def batch_decode(
        self,
        codes: Sequence[Tensor],
        streaming: bool = False,
        max_batch_size: int | None = None,
        reset_stream: bool = False,
        finalize_indices: Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """`decode` for a list of codes [n, frames] of different lengths.

        Args:
            streaming: the list holds the next frames of streams that earlier calls began, in their order; further items
                begin new ones (see `ContinuousDecoder`). A model has one such list of streams.
            max_batch_size: most streams at a time, fixed by the first call; by default as many as it brings.
            reset_stream: drop all streams and begin anew.
            finalize_indices: streams that end with this call; the later ones move up.

        Raises:
            ValueError: as `decode`, or options that do not go together.
        """
        if not streaming:
            if max_batch_size is not None or reset_stream or finalize_indices is not None:
                raise ValueError("max_batch_size, reset_stream and finalize_indices need streaming=True")
            padded, mask = pad_together(codes)
            return self.decode(padded.transpose(0, 1), mask, **options)
        if unknown := options.keys() - {"return_dict"}:
            raise ValueError(f"{', '.join(sorted(unknown))} cannot be combined with streaming=True")
        decoder = None if reset_stream else self._continuous_decoder
        if decoder is None:
            decoder = ContinuousDecoder(self, max_batch_size or len(codes))
        elif max_batch_size not in (None, decoder.max_batch_size):
            raise ValueError(
                f"max_batch_size is {decoder.max_batch_size} until reset_stream=True, got {max_batch_size}"
            )
        output = decoder.decode(codes, finalize_indices or ())
        self._continuous_decoder = decoder
        return output if options.get("return_dict") is not False else output.to_tuple()

    def stream(self, batch_size: int = 1, **options: Any) -> MossAudioTokenizerStream:
        """State for `batch_size` streams that are encoded or decoded chunk by chunk; see `MossAudioTokenizerStream`."""
        return MossAudioTokenizerStream(self, batch_size, **options)

    def compile_layers(self, **options: Any) -> None:
        """Compile every transformer layer in place with `torch.compile(**options)`; parameter names stay."""
        for stage in (*self.stages(self.encoder), *self.stages(self.decoder)):
            for layer in stage.transformer.layers:
                layer.compile(**options)

    @staticmethod
    def stages(modules: nn.ModuleList) -> list[ProjectedTransformer]:
        """The transformer stages of an encoder or decoder."""
        return [module for module in modules if isinstance(module, ProjectedTransformer)]

    def num_frames(self, lengths: Number) -> Number:
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

    def check_codes(self, codes: Tensor) -> None:
        """Raise ValueError unless codes are [n, B, frames] integers of this model."""
        check_codes(self.config, codes)

    def _prepare_audio(self, audio: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Checked audio [B, C, T] on the model's device, and how many samples of each item are real."""
        audio = check_audio(self.config, audio).to(self.device)
        if audio.shape[2] == 0:
            raise ValueError("the audio has no samples")
        return audio, valid_lengths(padding_mask, audio.shape[0], audio.shape[2], audio.device)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a folder or repository in the released layout; a missing or left-over weight is a ValueError."""
        kwargs.setdefault("key_mapping", OLDER_WEIGHT_NAMES)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        problems = {kind: sorted(map(str, info[kind])) for kind in info if info[kind]}
        if problems:
            details = "; ".join(f"{kind}: {', '.join(names[:5])} ({len(names)})" for kind, names in problems.items())
            raise ValueError(f"the weights do not fit the configuration: {details}")
        # Renaming on load would be undone on save; the names written are always the released ones.
        model._weight_conversions = None
        return (model, info) if output_loading_info else model


def build_modules(config: MossAudioTokenizerConfig, name: str) -> nn.ModuleList:
    """Modules of `encoder_kwargs` or `decoder_kwargs`, indexed as in the released weights (patch modules count)."""
    frames, windows = frames_per_code_frame(config, name), stage_windows(config, name)
    flash = getattr(config, "attention_implementation", None) != "sdpa"
    modules: list[nn.Module] = []
    for number, entry in enumerate(getattr(config, name)):
        options = {key: value for key, value in entry.items() if key not in ("module_type", "context_duration")}
        if number in frames:
            options |= {"window": windows[number], "frames_per_code_frame": frames[number], "flash": flash}
            modules.append(ProjectedTransformer(**options))
        else:
            modules.append(PatchedPretransform(entry["patch_size"], is_downsample=name == "encoder_kwargs"))
    return nn.ModuleList(modules)
