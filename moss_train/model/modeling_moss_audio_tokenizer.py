"""Cat: causal audio tokenizer with transformer (arXiv 2602.10934), the public model."""

import copy
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from .accelerated_step import GraphedStep, LinearOps

# Several releases of transformers copy only the files that this one imports directly, so it imports all of them.
from .argument_checks import check_audio, check_codes, check_level, check_samples, chunk_frames, valid_lengths
from .attention import MultiheadAttention
from .codec import (
    LatentCodec,
    MossAudioTokenizerDecoderOutput,
    MossAudioTokenizerEncoderOutput,
    MossAudioTokenizerOutput,
    complete_frames,
    decode_chunked,
    decode_unbatched,
    encode_chunked,
    encode_unbatched,
)
from .configuration_moss_audio_tokenizer import MossAudioTokenizerConfig, check_architecture
from .kv_cache import StageState
from .quantizer import ResidualLFQ
from .streaming import ContinuousDecoder, MossAudioTokenizerStream
from .transformer import initialize_weights
from .waveforms import as_tensor, pad_together, set_level

if TYPE_CHECKING:  # found by `save_pretrained`, which copies the file; at run time it would import all pipelines
    from .pipeline_moss_audio_tokenizer import MossAudioTokenizerPipeline  # noqa: F401

__all__ = [
    "ContinuousDecoder",
    "GraphedStep",
    "LatentCodec",
    "LinearOps",
    "MossAudioTokenizerConfig",
    "MossAudioTokenizerDecoderOutput",
    "MossAudioTokenizerEncoderOutput",
    "MossAudioTokenizerModel",
    "MossAudioTokenizerOutput",
    "MossAudioTokenizerStream",
    "MultiheadAttention",
    "ResidualLFQ",
    "StageState",
    "check_architecture",
]

OLDER_WEIGHT_NAMES = {
    r"self_attn\.in_proj_weight$": "self_attn.in_projs.0.weight",
    r"self_attn\.out_proj\.weight$": "self_attn.out_projs.0.weight",
}


class MossAudioTokenizerModel(LatentCodec):
    """Encoder, residual quantizer and decoder, with the interface of the released model.

    One deliberate difference: a partial last frame is zero-padded and counted (the released code drops it).
    `encode` and `decode` run without gradients; `forward` is differentiable.
    """

    base_model_prefix = "moss_audio_tokenizer"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerLayer", "ResidualLFQ"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["quantizer"]  # noqa: RUF012

    def __init__(self, config: MossAudioTokenizerConfig) -> None:
        super().__init__(config)
        self._continuous_decoder: ContinuousDecoder | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialize_weights(module)

    @property
    def sampling_rate(self) -> int:
        """Sampling rate in Hz of the waveform that the encoder takes."""
        return self.config.sampling_rate

    @property
    def output_sampling_rate(self) -> int:
        """Sampling rate in Hz of the waveform that the decoder returns."""
        return self.config.output_sampling_rate

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
        num_samples, ratio = audio.shape[2], self.config.output_ratio
        audio = complete_frames(audio, lengths, slice(0, self.num_frames(audio.shape[2])), self.config.downsample_rate)
        used = torch.full((audio.shape[0],), levels, device=audio.device)
        quantizer_output = self.quantizer(self.encode_latent(audio), used)
        reconstruction = self.decode_latent(quantizer_output.quantized)
        frames = self.num_frames(lengths)
        codes = quantizer_output.codes[:levels]
        output = MossAudioTokenizerOutput(
            audio=reconstruction[..., : num_samples * ratio],
            audio_lengths=lengths * ratio,
            audio_codes=codes * (torch.arange(codes.shape[2], device=codes.device) < frames[:, None].to(codes.device)),
            audio_codes_lengths=frames,
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
        loudness: float | None = None,
    ) -> MossAudioTokenizerEncoderOutput | tuple[Tensor, ...]:
        """Return the codes of a batch of waveforms.

        Args:
            input_values: [B, C, T], [B, T] or [T] samples at `sampling_rate`, as a tensor, an array or lists.
            padding_mask: [B, T], true for real samples; padding is at the end.
            num_quantizers: levels to compute, all by default.
            chunk_duration: seconds per chunk, a whole number of frames; the result equals that of the whole clip.
            batch_invariant: make the codes of a clip independent, to the last bit, of its batch and padding: each clip
                is encoded alone and unpadded, without the speed-up of batching.
            loudness: first bring every clip to this RMS level in dB relative to full scale, say -20 (see `set_level`).

        Raises:
            ValueError: an illegal shape, `num_quantizers` or `chunk_duration`, or samples that are not finite.
        """
        levels = self.check_num_quantizers(num_quantizers)
        chunk = chunk_frames(self.config, chunk_duration)
        audio, lengths = self._prepare_audio(input_values, padding_mask, loudness)
        frames = self.num_frames(lengths)
        if batch_invariant:
            clips = [clip[None, :, :length] for clip, length in zip(audio, lengths.tolist(), strict=True)]
            codes, latent = encode_unbatched(self, clips, levels, chunk)
        else:
            codes, latent = encode_chunked(self, audio, lengths, levels, chunk)
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
        """Return the waveforms of codes [n, B, frames] of the first n levels (or [n, frames] of one clip).

        Args:
            padding_mask: [B, frames], true for real frames; gives `audio_lengths`.
            chunk_duration, batch_invariant: as in `encode`.
            num_quantizers: use only the first `num_quantizers` of the given levels.

        Raises:
            ValueError: codes out of range, too many levels, or an illegal `chunk_duration`.
        """
        chunk = chunk_frames(self.config, chunk_duration)
        self.check_part("decoder")
        codes = as_tensor(audio_codes, "codes")
        codes = check_codes(self.config, codes[:, None] if codes.ndim == 2 else codes)
        codes = codes[: self.check_num_quantizers(num_quantizers)].to(self.execution_device)
        frames = valid_lengths(padding_mask, codes.shape[1], codes.shape[2], codes.device)
        if batch_invariant:
            clips = [codes[:, item : item + 1, :count] for item, count in enumerate(frames.tolist())]
            audio = decode_unbatched(self, clips, chunk)
        else:
            audio = decode_chunked(self, codes, chunk)
        output = MossAudioTokenizerDecoderOutput(audio=audio, audio_lengths=frames * self.config.upsample_rate)
        return output if return_dict is not False else output.to_tuple()

    def batch_encode(self, waveforms: Sequence[Tensor], **options: Any) -> Any:
        """Call `encode` for a list of waveforms [C, T] or [T] of different lengths."""
        clips = [as_tensor(waveform, "waveforms") for waveform in waveforms]
        return self.encode(*pad_together([clip if clip.ndim == 2 else clip[None] for clip in clips]), **options)

    def batch_decode(
        self,
        codes: Sequence[Tensor],
        streaming: bool = False,
        max_batch_size: int | None = None,
        reset_stream: bool = False,
        finalize_indices: Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """Call `decode` for a list of codes [n, frames] of different lengths.

        Args:
            streaming: the list holds the next frames of the streams that earlier calls started, in the same order;
                further items start new streams (see `ContinuousDecoder`). A model has one such list of streams.
            max_batch_size: most streams at a time, fixed by the first call; by default the number in that call.
            reset_stream: drop all earlier streams first.
            finalize_indices: indices of streams that end with this call; the later ones move up.

        Raises:
            ValueError: as in `decode`, or options that exclude each other.
        """
        codes = [as_tensor(item, "codes") for item in codes]
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
        """Start `batch_size` streams that are encoded or decoded chunk by chunk; see `MossAudioTokenizerStream`."""
        return MossAudioTokenizerStream(self, batch_size, **options)

    def check_codes(self, codes: Tensor) -> None:
        """Raise ValueError unless codes are [n, B, frames] integers of this model."""
        check_codes(self.config, codes)

    def _prepare_audio(
        self, values: Tensor, padding_mask: Tensor | None, loudness: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return checked audio [B, C, T] on the model's device, and how many samples of each item are real."""
        self.check_part("encoder")
        audio = check_audio(self.config, values)
        if audio.numel() == 0:
            raise ValueError("the audio has no samples")
        lengths = valid_lengths(padding_mask, audio.shape[0], audio.shape[2], audio.device)
        check_samples(self.config, audio, lengths, self.warned)
        if loudness is None:
            check_level(self.config, audio, lengths, self.warned)
        else:
            audio = set_level(audio, loudness, lengths)
        return audio.to(self.execution_device), lengths.to(self.execution_device)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        part: str | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a folder or repository in the released layout.

        Args:
            part: "encoder" or "decoder" loads only that half and the quantizer; methods that need the other half raise
                ValueError. Of a repository with several weight files only those of that half are downloaded.

        Raises:
            ValueError: a missing or left-over weight, or a `part` that the folder does not have.
            OSError: weight files are not in the cache and cannot be downloaded.
        """
        kwargs.setdefault("key_mapping", OLDER_WEIGHT_NAMES)
        source, whole = pretrained_model_name_or_path, nullcontext(pretrained_model_name_or_path)
        if part is not None:
            kwargs["config"] = cls._config_of_part(source, part, kwargs)
        location = location_of(kwargs)  # before the call, which may change the options
        with whole if part is None else shards_of_part(source, part, kwargs) as place:
            try:
                loaded: Any = super().from_pretrained(place, *args, output_loading_info=True, **kwargs)
            except OSError as error:
                if part is None and (absent := absent_weights(source, location)):
                    raise OSError(
                        f"{source}: {', '.join(absent[:3])} ({len(absent)}) cannot be fetched; the cache has the other "
                        "files of weights, perhaps those of part="
                    ) from error
                raise
        model, info = loaded
        if part is not None:
            model.name_or_path = model.config._name_or_path = str(source)
        problems = {kind: sorted(map(str, info[kind])) for kind in info if info[kind]}
        if problems:
            details = "; ".join(f"{kind}: {', '.join(names[:5])} ({len(names)})" for kind, names in problems.items())
            raise ValueError(f"the weights do not fit the configuration: {details}")
        # transformers would undo the renaming on save; the names written are always the released ones.
        model._weight_conversions = None
        return (model, info) if output_loading_info else model

    @classmethod
    def _config_of_part(cls, source: Any, part: str, options: dict[str, Any]) -> MossAudioTokenizerConfig:
        config = options.get("config")
        # No isinstance check: AutoConfig of transformers 5.24 imports a second copy of the configuration's file.
        if config is None or isinstance(config, str | PathLike):
            config = cls.config_class.from_pretrained(source if config is None else config, **location_of(options))
        available = getattr(config, "part", None)
        if part not in ("encoder", "decoder") or available not in (None, part):
            choices = available or "encoder, decoder"
            raise ValueError(f"part={part!r} is not in this model, which has {choices}")
        config = copy.deepcopy(config)
        config.part = part
        return config


def location_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return those options of `from_pretrained` that say where the files of a repository are."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    return {name: options[name] for name in names if name in options}


def absent_weights(source: Any, location: dict[str, Any]) -> list[str]:
    """Return a repository's weight files that are not in the cache; [] unless its index and some of them are."""
    offline = {**location, "local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    found = None if os.path.isdir(source) else cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **offline)
    if found is None:
        return []
    files = sorted(set(json.loads(Path(found).read_text("utf-8"))["weight_map"].values()))
    absent = [file for file in files if cached_file(source, file, **offline) is None]
    return absent if len(absent) < len(files) else []


@contextmanager
def shards_of_part(source: Any, part: str, options: dict[str, Any]) -> Iterator[Any]:
    """Yield where to load the half `part` from, so that nothing else of a repository is downloaded.

    For a repository with several weight files this is a temporary folder with the files that hold weights of that half
    and an index of these weights; in all other cases it is `source` itself.

    Raises:
        ValueError: the index names files outside of its folder.
    """
    location = location_of(options)
    found = None
    if not os.path.isdir(source) and not options.get("variant") and options.get("use_safetensors") is not False:
        found = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **location)
    if found is None:
        yield source
        return
    index = json.loads(Path(found).read_text("utf-8"))
    wanted = {name: file for name, file in index["weight_map"].items() if name.startswith((f"{part}.", "quantizer."))}
    with TemporaryDirectory() as folder:
        place = Path(folder, location.get("subfolder") or "")
        place.mkdir(parents=True, exist_ok=True)
        for file in sorted(set(wanted.values())):
            if Path(file).name != file:
                raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} of {source} names {file!r}, which is no plain file name")
            shard: Any = cached_file(source, file, **location)  # raises where there is none
            (place / file).symlink_to(Path(shard).resolve())
        (place / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index | {"weight_map": wanted}), "utf-8")
        yield folder
