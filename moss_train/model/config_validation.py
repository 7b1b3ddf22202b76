"""Validate an architecture and refuse combinations that no model can be built from, with the reason."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

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


def check_architecture(config: Mapping[str, Any]) -> None:
    """Check the values of a configuration.

    Raises:
        ValueError: no model can be built from it, with the offending values.
    """
    check_positive("config", config, ("sampling_rate", "downsample_rate", "number_channels"))
    check_positive("config", config, ("causal_transformer_context_duration",), (int, float))
    check_quantizer(config["quantizer_kwargs"])
    for key, choices in CHOICES.items():
        if config.get(key) not in choices:
            raise ValueError(f"{key}={config[key]!r} is not one of {', '.join(map(str, choices[1:]))}")
    if config["number_channels"] > 1 and not config["enable_channel_interleave"]:
        raise ValueError(f"number_channels={config['number_channels']} needs enable_channel_interleave=true")
    check_modules(config, "encoder_kwargs", 1, config["quantizer_kwargs"]["input_dim"])
    check_modules(config, "decoder_kwargs", config["quantizer_kwargs"]["output_dim"], 1)


def check_modules(config: Mapping[str, Any], name: str, width: int, wanted: int) -> None:
    """Check the entries of an encoder or decoder: kinds, patch sizes, sizes that fit, windows of a frame or more."""
    entries = config[name]
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
    if math.prod(patches) != config["downsample_rate"] * config["number_channels"]:
        raise ValueError(
            f"{name}: patch sizes {patches} multiply to {math.prod(patches)}, but downsample_rate "
            f"{config['downsample_rate']} x {config['number_channels']} channel(s) is needed"
        )
    check_widths(name, entries, width, wanted)
    for number, window in stage_windows(config, name).items():
        if window < 1:
            raise ValueError(f"{name}[{number}]: the attention window is shorter than a frame; raise context_duration")


def check_widths(name: str, entries: Sequence[Mapping[str, Any]], width: int, wanted: int) -> None:
    """Raise ValueError unless each entry takes what the one before gives, from `width` to `wanted` channels."""
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
    given = [key for key in ("max_period", "layer_scale", "context_duration") if key in entry]
    check_positive(
        where, entry, [key for key in given if entry[key] is not None or key != "context_duration"], (int, float)
    )
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
    """Return a whole number, which JSON may have written as 24000.0; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise ValueError(f"config: {key} must be a positive int, got {value!r}")
    return int(value)


def as_entries(key: str, value: Any) -> list[dict[str, Any]]:
    """Return a copied list of mappings; ValueError for anything else."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not all(isinstance(entry, Mapping) for entry in value):
        raise ValueError(f"config: {key} must be a list of modules, got {value!r}")
    return [dict(entry) for entry in value]


def frames_per_code_frame(config: Mapping[str, Any], name: str) -> dict[int, int]:
    """Return the frames that each Transformer entry of `encoder_kwargs` or `decoder_kwargs` handles per code frame."""
    encodes = name == "encoder_kwargs"
    frames = config["downsample_rate"] * config["number_channels"] if encodes else 1
    result = {}
    for number, entry in enumerate(config[name]):
        if "patch_size" not in entry:
            result[number] = frames
        else:
            frames = frames // entry["patch_size"] if encodes else frames * entry["patch_size"]
    return result


def stage_windows(config: Mapping[str, Any], name: str) -> dict[int, int]:
    """Return the attention window, in frames, of each Transformer entry by its index."""
    frame_rate = config["sampling_rate"] / config["downsample_rate"]
    windows = {}
    for number, frames in frames_per_code_frame(config, name).items():
        seconds = config[name][number].get("context_duration") or config["causal_transformer_context_duration"]
        # The small constant keeps 12.5 x 10 from becoming 124 through float rounding of the rate.
        windows[number] = int(frame_rate * frames * seconds + 1e-6)
    return windows
