"""Configuration of the Cat audio tokenizer, in the keys of the released `config.json`, and its validation.

Combinations that no model can be built from are refused, with the reason.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig


class MossAudioTokenizerConfig(PretrainedConfig):
    """Architecture as data: two lists of modules and the quantizer's sizes.

    The released class has defaults that disagree with its own `config.json`, so there are none here for the lists: an
    empty configuration (which transformers builds internally) has no stages and is refused by the model.

    Args:
        sampling_rate: of the encoder's waveform, in Hz; by default `sample_rate`, its other name, or 24000.
        downsample_rate: samples of one channel per frame of codes; must equal the product of the patch sizes, divided
            by `number_channels` when channels are interleaved.
        causal_transformer_context_duration: attention window in seconds, for entries without `context_duration`.
        encoder_kwargs, decoder_kwargs: lists of `{"module_type": "PatchedPretransform", "patch_size"}` and
            `{"module_type": "Transformer", "input_dimension", "output_dimension", "d_model", "num_heads", ...}`.
        quantizer_kwargs: `input_dim`, `rvq_dim`, `output_dim`, `num_quantizers`, `codebook_size`, `codebook_dim`.
        number_channels: of the waveform; several are interleaved in time.
        output_sampling_rate: of the decoder's waveform, in Hz, a multiple of `sampling_rate`; None for the same rate.
            The product of the decoder's patch sizes is larger by the same factor.
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
        sampling_rate: int | None = None,
        downsample_rate: int = 1920,
        causal_transformer_context_duration: float = 10.0,
        encoder_kwargs: Sequence[Mapping[str, Any]] = (),
        decoder_kwargs: Sequence[Mapping[str, Any]] = (),
        quantizer_kwargs: Mapping[str, Any] | None = None,
        number_channels: int = 1,
        output_sampling_rate: int | None = None,
        **kwargs: Any,
    ) -> None:
        rate = kwargs.get("sample_rate", 24000) if sampling_rate is None else sampling_rate
        self.sampling_rate = kwargs["sample_rate"] = as_whole("sampling_rate", rate)
        self.downsample_rate = as_whole("downsample_rate", downsample_rate)
        self.causal_transformer_context_duration = causal_transformer_context_duration
        self.encoder_kwargs = as_entries("encoder_kwargs", encoder_kwargs)
        self.decoder_kwargs = as_entries("decoder_kwargs", decoder_kwargs)
        self.quantizer_kwargs = as_entries("quantizer_kwargs", [quantizer_kwargs or {}])[0]
        self.number_channels = as_whole("number_channels", number_channels)
        output_rate = self.sampling_rate if output_sampling_rate is None else output_sampling_rate
        self.output_sampling_rate = as_whole("output_sampling_rate", output_rate)
        kwargs.setdefault("enable_channel_interleave", self.number_channels > 1)
        kwargs.setdefault("quantizer_type", self.quantizer_kwargs.get("quantizer_type", "rlfq"))
        kwargs.setdefault("reversed_decoder_kwargs", None)
        super().__init__(**kwargs)
        if self.encoder_kwargs:
            check_architecture(self)

    @classmethod
    def from_stages(
        cls,
        sampling_rate: int,
        stages: Sequence[Mapping[str, Any]],
        quantizer: Mapping[str, Any],
        context_seconds: float = 10.0,
        layer_scale: float = 0.01,
        number_channels: int = 1,
        output_sampling_rate: int | None = None,
    ) -> "MossAudioTokenizerConfig":
        """Build a configuration in the released layout from five numbers per encoder stage; the decoder mirrors them.

        Args:
            stages: one mapping per stage with `patch_size`, `output_dimension`, `d_model`, `num_heads`, `num_layers`;
                `dim_feedforward` (4 x d_model) and `context_duration` (seconds) may be given.
            quantizer: `rvq_dim`, `num_quantizers`, `codebook_size`, `codebook_dim`.
            context_seconds: attention window of every stage.
            output_sampling_rate: of the decoder, in Hz; its last patch size is multiplied by the ratio of the rates.

        Raises:
            ValueError: a missing or unknown key of a stage, or an illegal combination.
        """
        encoder: list[dict[str, Any]] = []
        decoder: list[dict[str, Any]] = []
        width = 1
        check_stages(stages)
        check_positive("tokenizer", {"number_channels": number_channels}, ("number_channels",))
        ratio = output_ratio(sampling_rate, output_sampling_rate)
        for stage in stages:
            width *= stage["patch_size"]
            patch = {"module_type": "PatchedPretransform", "patch_size": stage["patch_size"]}
            transformer = {
                "module_type": "Transformer",
                **{key: stage[key] for key in ("d_model", "num_heads", "num_layers")},
                "dim_feedforward": stage.get("dim_feedforward", 4 * stage["d_model"]),
                **FIXED,
                "max_period": 10000,
                "layer_scale": layer_scale,
                "conv_layout": True,
                **{key: stage[key] for key in ("context_duration",) if key in stage},
            }
            sizes = {"input_dimension": width, "output_dimension": stage["output_dimension"]}
            factor = 1 if decoder else ratio  # only the decoder's patch next to the waveform is larger
            mirrored = {"input_dimension": stage["output_dimension"], "output_dimension": width * factor}
            encoder += [patch, transformer | sizes]
            decoder = [transformer | mirrored, patch | {"patch_size": stage["patch_size"] * factor}, *decoder]
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
            output_sampling_rate=output_sampling_rate,
        )

    @property
    def frame_rate(self) -> float:
        """Frames of codes per second."""
        return self.sampling_rate / self.downsample_rate

    @property
    def output_ratio(self) -> int:
        """Samples of the decoder's waveform for each sample of the encoder's."""
        return self.output_sampling_rate // self.sampling_rate

    @property
    def upsample_rate(self) -> int:
        """Samples of one channel that the decoder produces per frame of codes."""
        return self.downsample_rate * self.output_ratio

    @property
    def num_quantizers(self) -> int:
        """Number of residual levels."""
        return self.quantizer_kwargs["num_quantizers"]

    def frames_per_code_frame(self, name: str) -> dict[int, int]:
        """Return the number of frames that each stage processes per frame of codes.

        Args:
            name: "encoder_kwargs" or "decoder_kwargs"; the keys of the result are indices into it.
        """
        encodes = name == "encoder_kwargs"
        frames = self.downsample_rate * self.number_channels if encodes else 1
        result = {}
        for number, entry in enumerate(getattr(self, name)):
            if "patch_size" not in entry:
                result[number] = frames
            else:
                frames = frames // entry["patch_size"] if encodes else frames * entry["patch_size"]
        return result

    def stage_windows(self, name: str) -> dict[int, int]:
        """Return each stage's attention window in frames of that stage; keys as in `frames_per_code_frame`."""
        windows = {}
        for number, frames in self.frames_per_code_frame(name).items():
            entry = getattr(self, name)[number]
            seconds = entry.get("context_duration") or self.causal_transformer_context_duration
            # The small constant keeps 12.5 x 10 from becoming 124 through float rounding of the rate.
            windows[number] = int(self.frame_rate * frames * seconds + 1e-6)
        return windows

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with class references in `auto_map` and without an output rate equal to the encoder's.

        transformers treats any class with "Tokenizer" in its name as a text tokenizer and stores a (slow, fast) pair,
        which its own loader then cannot read for a model.
        """
        output = super().to_dict()
        if output.get("output_sampling_rate") == output.get("sampling_rate"):
            output.pop("output_sampling_rate", None)  # files of models with one rate stay as they were
        if auto_map := output.get("auto_map"):
            pairs = {name: value for name, value in auto_map.items() if not isinstance(value, str)}
            output["auto_map"] = {**auto_map, **{name: value[0] for name, value in pairs.items()}}
        return output


STAGE_KEYS = {"patch_size", "output_dimension", "d_model", "num_heads", "num_layers"}
OPTIONAL_STAGE_KEYS = {"dim_feedforward", "context_duration"}
ENTRY_SIZES = ("input_dimension", "output_dimension", "d_model", "num_heads", "num_layers", "dim_feedforward")
FIXED = {"causal": True, "norm": "layer_norm", "positional_embedding": "rope", "gating": "none"}
OPTIONAL_ENTRY_KEYS = {"module_type", "max_period", "layer_scale", "conv_layout", "context_duration"}
ENTRY_KEYS = {
    "PatchedPretransform": {"module_type", "patch_size"},
    "Transformer": {*ENTRY_SIZES, *OPTIONAL_ENTRY_KEYS, *FIXED},
}
QUANTIZER_SIZES = {"input_dim", "rvq_dim", "output_dim", "num_quantizers", "codebook_size", "codebook_dim"}
CHOICES = {
    "attention_implementation": (None, "sdpa", "flash_attention_2"),
    "compute_dtype": (None, "fp32", "bf16", "fp16"),
    "part": (None, "encoder", "decoder"),
}


def check_architecture(config: MossAudioTokenizerConfig) -> None:
    """Check the values of a configuration.

    Raises:
        ValueError: no model can be built from it, with the offending values.
    """
    values = vars(config)
    check_positive("config", values, ("sampling_rate", "downsample_rate", "number_channels"))
    output_ratio(config.sampling_rate, config.output_sampling_rate)
    check_positive("config", values, ("causal_transformer_context_duration",), (int, float))
    check_quantizer(config.quantizer_kwargs)
    for key, choices in CHOICES.items():
        if values.get(key) not in choices:
            raise ValueError(f"{key}={values[key]!r} is not one of {', '.join(map(str, choices[1:]))}")
    if config.number_channels > 1 and not values["enable_channel_interleave"]:
        raise ValueError(f"number_channels={config.number_channels} needs enable_channel_interleave=true")
    check_modules(config, "encoder_kwargs", 1, config.quantizer_kwargs["input_dim"])
    check_modules(config, "decoder_kwargs", config.quantizer_kwargs["output_dim"], 1)


def output_ratio(sampling_rate: int, output_sampling_rate: int | None) -> int:
    """Return the number of samples of the decoder's waveform for each sample of the encoder's.

    Raises:
        ValueError: the output rate is not a multiple of the encoder's.
    """
    output = sampling_rate if output_sampling_rate is None else output_sampling_rate
    rates = {"sampling_rate": sampling_rate, "output_sampling_rate": output}
    rates = {name: as_whole(name, rate) for name, rate in rates.items()}
    check_positive("config", rates, tuple(rates))
    if rates["output_sampling_rate"] % rates["sampling_rate"]:
        raise ValueError(f"output_sampling_rate={output} is not a multiple of sampling_rate={sampling_rate}")
    return rates["output_sampling_rate"] // rates["sampling_rate"]


def check_modules(config: MossAudioTokenizerConfig, name: str, width: int, wanted: int) -> None:
    """Raise ValueError unless the entries of an encoder or decoder are known and their sizes and windows fit."""
    entries = getattr(config, name)
    for number, entry in enumerate(entries):
        where, kind = f"{name}[{number}]", entry.get("module_type")
        if not isinstance(kind, str) or kind not in ENTRY_KEYS:
            raise ValueError(f"{where}: module_type {kind!r} is not one of {', '.join(ENTRY_KEYS)}")
        if unknown := entry.keys() - ENTRY_KEYS[kind]:
            raise ValueError(f"{where}: a {kind} has no {', '.join(sorted(unknown))}")
        if kind == "PatchedPretransform":
            check_positive(where, entry, ("patch_size",))
        else:
            check_transformer(where, entry)
    patches = [entry["patch_size"] for entry in entries if "patch_size" in entry]
    ratio = 1 if name == "encoder_kwargs" else config.output_ratio
    if math.prod(patches) != config.downsample_rate * ratio * config.number_channels:
        times = f" x {ratio} (output_sampling_rate)" if ratio > 1 else ""
        raise ValueError(
            f"{name}: patch sizes {patches} multiply to {math.prod(patches)}, but downsample_rate "
            f"{config.downsample_rate}{times} x {config.number_channels} channel(s) is needed"
        )
    check_widths(name, entries, width, wanted)
    for number, window in config.stage_windows(name).items():
        if window < 1:
            raise ValueError(f"{name}[{number}]: the attention window is shorter than a frame; raise context_duration")


def check_widths(name: str, entries: Sequence[Mapping[str, Any]], width: int, wanted: int) -> None:
    """Raise ValueError unless each entry takes the channels that the one before returns, from `width` to `wanted`."""
    for number, entry in enumerate(entries):
        patch = entry.get("patch_size")
        if patch is None and entry["input_dimension"] != width:
            raise ValueError(f"{name}[{number}]: input_dimension {entry['input_dimension']} receives {width} channels")
        if patch is None:
            width = entry["output_dimension"]
        elif name == "encoder_kwargs":
            width *= patch
        elif width % patch:
            raise ValueError(f"{name}[{number}]: {width} channels cannot be split into {patch}")
        else:
            width //= patch
    if width != wanted:
        raise ValueError(f"{name} ends with {width} channels, {wanted} are needed")


def check_transformer(where: str, entry: Mapping[str, Any]) -> None:
    """Raise ValueError for sizes that do not divide and for variants of the block that Cat does not have."""
    check_positive(where, entry, ENTRY_SIZES)
    check_heads(where, entry)
    given = [key for key in ("max_period", "layer_scale") if key in entry]
    given += ["context_duration"] if entry.get("context_duration") is not None else []
    check_positive(where, entry, given, (int, float))
    for key, value in FIXED.items():
        if entry.get(key, value) != value:
            raise ValueError(f"{where}: {key}={entry[key]!r} is not supported, Cat has {value!r}")


def check_heads(where: str, sizes: Mapping[str, Any]) -> None:
    """Raise ValueError unless the width divides into heads of an even width, as rotary embedding needs."""
    if sizes["d_model"] % (2 * sizes["num_heads"]):
        raise ValueError(
            f"d_model {sizes['d_model']} must be an even multiple of num_heads {sizes['num_heads']} ({where})"
        )


def check_quantizer(sizes: Mapping[str, Any]) -> None:
    """Raise ValueError for missing, unknown or non-positive sizes and for other kinds of quantizer."""
    if missing := QUANTIZER_SIZES - sizes.keys():
        raise ValueError(f"quantizer_kwargs lacks {', '.join(sorted(missing))}")
    if unknown := sizes.keys() - QUANTIZER_SIZES - {"quantizer_type"}:
        raise ValueError(f"quantizer_kwargs has unknown keys: {', '.join(sorted(unknown))}")
    kind = sizes.get("quantizer_type", "rlfq")
    if kind != "rlfq":
        raise ValueError(f"quantizer_type={kind!r} is not known; Cat has 'rlfq'")
    check_positive("quantizer_kwargs", sizes, sorted(QUANTIZER_SIZES))
    if sizes["rvq_dim"] == sizes["codebook_dim"]:
        raise ValueError(
            f"quantizer_kwargs: rvq_dim and codebook_dim are both {sizes['rvq_dim']}; the released layout has no "
            "projections around such levels, choose another rvq_dim"
        )


def check_stages(stages: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless every stage of a run configuration has the known keys."""
    if not stages:
        raise ValueError("stages is empty, a tokenizer needs one stage or more")
    for number, stage in enumerate(stages):
        missing = STAGE_KEYS - stage.keys()
        unknown = stage.keys() - STAGE_KEYS - OPTIONAL_STAGE_KEYS
        if missing or unknown:
            raise ValueError(f"stages[{number}]: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}")
        check_positive(f"stages[{number}]", stage, sorted(STAGE_KEYS))
        check_heads(f"stages[{number}]", stage)


def check_positive(
    where: str, values: Mapping[str, Any], keys: Sequence[str], kind: type | tuple[type, ...] = int
) -> None:
    """Raise ValueError unless each key is there with a positive finite number of the given kind."""
    name = "int" if kind is int else "number"
    for key in keys:
        value = values.get(key)
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if value is None or not is_number or not 0 < value < math.inf:
            raise ValueError(f"{where}: {key} must be a positive {name}, got {value!r}")


def as_whole(key: str, value: Any) -> int:
    """Return a whole number, which JSON may hold as 24000.0, as an int. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise ValueError(f"config: {key} must be a positive int, got {value!r}")
    return int(value)


def as_entries(key: str, value: Any) -> list[dict[str, Any]]:
    """Return a copy of a list of mappings. Raises ValueError for anything else."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not all(isinstance(entry, Mapping) for entry in value):
        raise ValueError(f"config: {key} must be a list of modules, got {value!r}")
    return [dict(entry) for entry in value]
