"""Adapt an architecture to another sampling rate, channels or patches, and carry over the weights that still fit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from moss_train.audio.io import resample
from moss_train.model import MossAudioTokenizerConfig
from moss_train.utils.errors import UserError

CHANGES = ("sampling_rate", "number_channels", "patch_sizes", "num_quantizers")


@dataclass(frozen=True)
class WeightReport:
    """What became of the weights of one network, by name.

    Attributes:
        kept: taken over bit by bit.
        resampled: made from the old ones for the new sampling rate or channels.
        fresh: started afresh, because there is none of that name and shape.
        left_over: not taken over.
    """

    kept: tuple[str, ...] = ()
    resampled: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()


def adapt_config(old: MossAudioTokenizerConfig, changes: Mapping[str, Any]) -> MossAudioTokenizerConfig:
    """The architecture of a given model with some of CHANGES; null and missing ones stay as they are.

    Unless `patch_sizes` (samples or frames that each stage joins, encoder order) are given, the first patch follows
    sampling rate and channels, so that the frame rate stays.

    Raises:
        UserError: a key that cannot be changed, or values that do not go together.
    """
    wanted = {key: value for key, value in changes.items() if value is not None}
    if unknown := wanted.keys() - set(CHANGES):
        raise UserError(
            f"tokenizer.{min(unknown)}: the architecture comes with init, which can only be given another "
            f"{', '.join(CHANGES)}"
        )
    if not wanted:
        return old
    rate, channels = wanted.get("sampling_rate", old.sampling_rate), wanted.get("number_channels", old.number_channels)
    values = old.to_dict() | {"sampling_rate": rate, "number_channels": channels}
    values.pop("sample_rate", None)
    patches = wanted.get("patch_sizes") or following_patches(old, rate, channels)
    values |= with_patches(old, patches)
    hop = math.prod(patches)
    if hop % channels:
        raise UserError(f"tokenizer.patch_sizes={patches} multiply to {hop}, not a multiple of {channels} channels")
    values |= {"downsample_rate": hop // channels, "enable_channel_interleave": channels > 1}
    levels = {"num_quantizers": wanted.get("num_quantizers", old.num_quantizers)}
    values["quantizer_kwargs"] = old.quantizer_kwargs | levels
    try:
        return MossAudioTokenizerConfig(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"tokenizer: {error}") from error


def patch_sizes(config: MossAudioTokenizerConfig) -> list[int]:
    """Patch sizes in the encoder's order."""
    return [entry["patch_size"] for entry in config.encoder_kwargs if "patch_size" in entry]


def following_patches(old: MossAudioTokenizerConfig, rate: int, channels: int) -> list[int]:
    """Patch sizes for which a frame lasts as long as before; UserError when no whole first patch does that."""
    first, *others = patch_sizes(old)
    wanted = Fraction(first) * Fraction(rate, old.sampling_rate) * Fraction(channels, old.number_channels)
    if wanted.denominator != 1:
        raise UserError(
            f"tokenizer: {rate} Hz and {channels} channel(s) would make the first patch {float(wanted):g} samples at "
            f"the old frame rate of {old.frame_rate:g}: give tokenizer.patch_sizes=[...], now {[first, *others]}"
        )
    return [int(wanted), *others]


def with_patches(old: MossAudioTokenizerConfig, patches: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Encoder and decoder entries with these patch sizes and the projections that fit them; widths stay."""
    count = len(patch_sizes(old))
    if len(patches) != count or not all(isinstance(size, int) and size > 0 for size in patches):
        raise UserError(f"tokenizer.patch_sizes={patches} must be {count} whole numbers, one for each stage of init")
    return {
        "encoder_kwargs": rescale_patches(old.encoder_kwargs, patches, "input_dimension", "output_dimension"),
        "decoder_kwargs": rescale_patches(old.decoder_kwargs[::-1], patches, "output_dimension", "input_dimension")[
            ::-1
        ],
    }


def rescale_patches(entries: list[dict[str, Any]], patches: list[int], outer: str, inner: str) -> list[dict[str, Any]]:
    """Entries from the waveform inwards with new patch sizes; `outer` is the projection's side towards the waveform."""
    sizes = iter(patches)
    width, result = 1, []
    for entry in entries:
        if "patch_size" in entry:
            result.append({**entry, "patch_size": next(sizes)})
            width *= result[-1]["patch_size"]
        else:
            result.append({**entry, outer: width})
            width = entry[inner]
    return result


@torch.no_grad()
def load_matching_weights(
    module: nn.Module, weights: Mapping[str, Tensor], made: Mapping[str, Tensor] | None = None
) -> WeightReport:
    """Give a module every weight of equal name and shape, and those `made` for it; the others stay as they are.

    Tensors that share memory in the module count once, under their first name.
    """
    made, every = made or {}, module.state_dict()
    first = {id(tensor): name for name, tensor in reversed(module.state_dict(keep_vars=True).items())}
    own = {name: every[name] for name in every if name in set(first.values())}
    sources = {name: made.get(name, weights.get(name)) for name in own}
    fits = {name: tensor for name, tensor in sources.items() if tensor is not None and tensor.shape == own[name].shape}
    for name, tensor in fits.items():
        own[name].copy_(tensor)
    return WeightReport(
        kept=tuple(name for name in fits if name not in made),
        resampled=tuple(name for name in fits if name in made),
        fresh=tuple(name for name in own if name not in fits),
        left_over=tuple(name for name in weights if name not in fits and (name in own or name not in every)),
    )


def resampled_projections(
    old: MossAudioTokenizerConfig, new: MossAudioTokenizerConfig, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The two projections at the waveform, made from the old ones for another rate or other channels, by name.

    Where a patch lasts as long as before, the new encoder does what the old one did to the resampled waveform with its
    channels averaged, and the new decoder gives the old one's waveform, resampled, on every channel. Nothing otherwise.
    """
    before, after = patch_sizes(old)[0], patch_sizes(new)[0]
    if (old.sampling_rate, old.number_channels) == (new.sampling_rate, new.number_channels):
        return {}
    whole = before % old.number_channels == 0 and after % new.number_channels == 0
    lasts = Fraction(before, old.sampling_rate * old.number_channels)
    if not whole or lasts != Fraction(after, new.sampling_rate * new.number_channels):
        return {}
    first = f"encoder.{waveform_stage(new.encoder_kwargs)}.input_proj.weight"
    last = f"decoder.{len(new.decoder_kwargs) - 1 - waveform_stage(new.decoder_kwargs[::-1])}.output_proj.weight"
    made = {}
    if first in weights:
        made[first] = resampled_input(weights[first], old, new)
    if last in weights:
        made[last] = resampled_output(weights[last], old, new)
    return made


def waveform_stage(entries: list[dict[str, Any]]) -> int:
    """Place of the first transformer, counted from the waveform; it follows exactly one patch in every Cat."""
    return next(number for number, entry in enumerate(entries) if "patch_size" not in entry)


def resampled_input(weight: Tensor, old: MossAudioTokenizerConfig, new: MossAudioTokenizerConfig) -> Tensor:
    """[D, old patch] -> [D, new patch]: the old map after resampling a patch to the old rate."""
    parts = weight.unflatten(1, (-1, old.number_channels))  # [D, samples, C]
    if old.number_channels != new.number_channels:
        parts = parts.sum(dim=2, keepdim=True).expand(-1, -1, new.number_channels) / new.number_channels
    if old.sampling_rate != new.sampling_rate:
        impulses = torch.eye(patch_sizes(new)[0] // new.number_channels, dtype=weight.dtype)
        responses = resample(impulses, new.sampling_rate, old.sampling_rate)[:, : parts.shape[1]]
        parts = torch.einsum("dsc,ns->dnc", parts, responses)
    return parts.flatten(1)


def resampled_output(weight: Tensor, old: MossAudioTokenizerConfig, new: MossAudioTokenizerConfig) -> Tensor:
    """[old patch, D] -> [new patch, D]: the old map, its patch of waveform resampled to the new rate."""
    parts = weight.unflatten(0, (-1, old.number_channels))  # [samples, C, D]
    if old.number_channels != new.number_channels:
        parts = parts.mean(dim=1, keepdim=True).expand(-1, new.number_channels, -1)
    if old.sampling_rate != new.sampling_rate:
        samples = patch_sizes(new)[0] // new.number_channels
        waves = parts.movedim(0, 2).contiguous()
        parts = resample(waves, old.sampling_rate, new.sampling_rate)[..., :samples].movedim(2, 0)
    return parts.flatten(0, 1)
