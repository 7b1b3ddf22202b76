"""Configuration of the Cat audio tokenizer, in the keys of the released `config.json`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from .config_validation import (
    as_entries,
    as_whole,
    check_architecture,
    check_positive,
    check_stages,
    frames_per_code_frame,
    stage_windows,
)


class MossAudioTokenizerConfig(PretrainedConfig):
    """Architecture as data: two lists of modules and the quantizer's sizes.

    The released class has defaults that disagree with its own `config.json`, so there are none here for the lists: an
    empty configuration (which transformers builds internally) has no stages and is refused by the model.

    Args:
        sampling_rate: of the waveform, in Hz.
        downsample_rate: samples of one channel per frame of codes; must equal the product of the patch sizes, divided
            by `number_channels` when channels are interleaved.
        causal_transformer_context_duration: attention window in seconds, for entries without `context_duration`.
        encoder_kwargs, decoder_kwargs: lists of `{"module_type": "PatchedPretransform", "patch_size"}` and
            `{"module_type": "Transformer", "input_dimension", "output_dimension", "d_model", "num_heads", ...}`.
        quantizer_kwargs: `input_dim`, `rvq_dim`, `output_dim`, `num_quantizers`, `codebook_size`, `codebook_dim`.
        number_channels: of the waveform; several are interleaved in time.
        kwargs: also `attention_implementation` ("sdpa": torch's general kernels; "flash_attention_2" or not given: the
            windowed kernel where device and dtype have it) and `compute_dtype` ("bf16" or "fp16": automatic mixed
            precision in encoder and decoder; "fp32" or not given: the weights' own dtype), `part` ("encoder" or
            "decoder" for half a model) and `training_level_db` (RMS level of the training data).

    Raises:
        ValueError: an illegal combination, with the offending values.
    """

    model_type = "speech_tokenizer"

    def __init__(
        self,
        sampling_rate: int = 24000,
        downsample_rate: int = 1920,
        causal_transformer_context_duration: float = 10.0,
        encoder_kwargs: Sequence[Mapping[str, Any]] = (),
        decoder_kwargs: Sequence[Mapping[str, Any]] = (),
        quantizer_kwargs: Mapping[str, Any] | None = None,
        number_channels: int = 1,
        **kwargs: Any,
    ) -> None:
        self.sampling_rate = kwargs["sample_rate"] = as_whole("sampling_rate", sampling_rate)
        self.downsample_rate = as_whole("downsample_rate", downsample_rate)
        self.causal_transformer_context_duration = causal_transformer_context_duration
        self.encoder_kwargs = as_entries("encoder_kwargs", encoder_kwargs)
        self.decoder_kwargs = as_entries("decoder_kwargs", decoder_kwargs)
        self.quantizer_kwargs = as_entries("quantizer_kwargs", [quantizer_kwargs or {}])[0]
        self.number_channels = as_whole("number_channels", number_channels)
        kwargs.setdefault("enable_channel_interleave", self.number_channels > 1)
        kwargs.setdefault("quantizer_type", self.quantizer_kwargs.get("quantizer_type", "rlfq"))
        kwargs.setdefault("reversed_decoder_kwargs", None)
        super().__init__(**kwargs)
        if self.encoder_kwargs:
            check_architecture(vars(self))

    @classmethod
    def from_stages(
        cls,
        sampling_rate: int,
        stages: Sequence[Mapping[str, Any]],
        quantizer: Mapping[str, Any],
        context_seconds: float = 10.0,
        layer_scale: float = 0.01,
        number_channels: int = 1,
    ) -> "MossAudioTokenizerConfig":
        """Expand five numbers per encoder stage to the released lists; the decoder mirrors the encoder.

        Args:
            stages: one mapping per stage with `patch_size`, `output_dimension`, `d_model`, `num_heads`, `num_layers`;
                `dim_feedforward` (4 x d_model) and `context_duration` (seconds) may be given.
            quantizer: `rvq_dim`, `num_quantizers`, `codebook_size`, `codebook_dim`.
            context_seconds: attention window of every stage.

        Raises:
            ValueError: a missing or unknown key of a stage, or an illegal combination.
        """
        encoder: list[dict[str, Any]] = []
        decoder: list[dict[str, Any]] = []
        width = 1
        check_stages(stages)
        check_positive("tokenizer", {"number_channels": number_channels}, ("number_channels",))
        for stage in stages:
            width *= stage["patch_size"]
            patch = {"module_type": "PatchedPretransform", "patch_size": stage["patch_size"]}
            transformer = expand_stage(stage, layer_scale)
            sizes = {"input_dimension": width, "output_dimension": stage["output_dimension"]}
            mirrored = {"input_dimension": stage["output_dimension"], "output_dimension": width}
            encoder += [patch, transformer | sizes]
            decoder = [transformer | mirrored, dict(patch), *decoder]
            width = stage["output_dimension"]
        hop = math.prod(stage["patch_size"] for stage in stages)
        if hop % number_channels:
            raise ValueError(f"the patch sizes multiply to {hop}, not a multiple of number_channels={number_channels}")
        return cls(
            sampling_rate=sampling_rate,
            downsample_rate=hop // number_channels,
            causal_transformer_context_duration=context_seconds,
            encoder_kwargs=encoder,
            decoder_kwargs=decoder,
            quantizer_kwargs={"input_dim": width, "output_dim": width, "quantizer_type": "rlfq", **quantizer},
            number_channels=number_channels,
        )

    @property
    def frame_rate(self) -> float:
        """Frames of codes per second."""
        return self.sampling_rate / self.downsample_rate

    @property
    def num_quantizers(self) -> int:
        """Number of residual levels."""
        return self.quantizer_kwargs["num_quantizers"]

    def frames_per_code_frame(self, name: str) -> dict[int, int]:
        """Return the frames that each stage handles per frame of codes.

        Args:
            name: "encoder_kwargs" or "decoder_kwargs"; the keys of the result are indices into it.
        """
        return frames_per_code_frame(vars(self), name)

    def stage_windows(self, name: str) -> dict[int, int]:
        """Return each stage's attention window in its own frames, as `frames_per_code_frame` does."""
        return stage_windows(vars(self), name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with `auto_map` as class references.

        transformers takes any class with "Tokenizer" in its name for a text tokenizer and stores a (slow, fast) pair,
        which its own loader then cannot read for a model.
        """
        output = super().to_dict()
        if auto_map := output.get("auto_map"):
            pairs = {name: value for name, value in auto_map.items() if not isinstance(value, str)}
            output["auto_map"] = {**auto_map, **{name: value[0] for name, value in pairs.items()}}
        return output


def expand_stage(stage: Mapping[str, Any], layer_scale: float) -> dict[str, Any]:
    """The released Transformer entry of one stage, without its input and output dimension."""
    entry: dict[str, Any] = {
        "module_type": "Transformer",
        "d_model": stage["d_model"],
        "num_heads": stage["num_heads"],
        "num_layers": stage["num_layers"],
        "dim_feedforward": stage.get("dim_feedforward", 4 * stage["d_model"]),
        "causal": True,
        "norm": "layer_norm",
        "positional_embedding": "rope",
        "max_period": 10000,
        "gating": "none",
        "layer_scale": layer_scale,
        "conv_layout": True,
    }
    if "context_duration" in stage:
        entry["context_duration"] = stage["context_duration"]
    return entry
