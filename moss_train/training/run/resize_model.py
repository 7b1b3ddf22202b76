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

CHANGES = ("sampling_rate", "output_sampling_rate", "number_channels", "patch_sizes", "num_quantizers")
EDGE = 16
"""Samples by which a patch of waveform is extended on both sides for the filter of the resampler."""


@dataclass(frozen=True)
class WeightReport:
    """Where the weights of one network come from, by name.

    Attributes:
        loaded: copied from the old model, bit by bit.
        resampled: computed from the old weights for the new sampling rate or channels.
        new: newly initialised, because the old model has no weight of that name and shape.
        unused: weights of the old model that the new one has no place for.
    """

    loaded: tuple[str, ...] = ()
    resampled: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def adapt_config(old: MossAudioTokenizerConfig, changes: Mapping[str, Any]) -> MossAudioTokenizerConfig:
    """Return the architecture of a given model with some of CHANGES; null and missing ones stay as they are.

    Unless `patch_sizes` (samples or frames that each stage joins, in the encoder's order) are given, the first patch is
    scaled with sampling rate and channels, so that the frame rate stays the same. If the decoder has its own, higher
    sampling rate, its patch at the waveform is longer by the same factor; such a rate of the old model is kept.

    Raises:
        UserError: a key cannot be changed, or values do not fit together.
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
    own_rate = None if old.output_ratio == 1 else old.output_sampling_rate
    output_rate = wanted.get("output_sampling_rate", own_rate or rate)
    if output_rate % rate:
        raise UserError(f"tokenizer.output_sampling_rate={output_rate} is not a multiple of sampling_rate={rate}")
    values = old.to_dict() | {"sampling_rate": rate, "number_channels": channels, "output_sampling_rate": output_rate}
    values.pop("sample_rate", None)
    first, *others = present = patch_sizes(old)
    patches = wanted.get("patch_sizes")
    if not patches:
        scaled = Fraction(first) * Fraction(rate, old.sampling_rate) * Fraction(channels, old.number_channels)
        if scaled.denominator != 1:
            raise UserError(
                f"tokenizer: {rate} Hz and {channels} channel(s) would make the first patch {float(scaled):g} samples "
                f"at the old frame rate of {old.frame_rate:g}: give tokenizer.patch_sizes=[...], now {present}"
            )
        patches = [int(scaled), *others]
    if len(patches) != len(present) or not all(isinstance(size, int) and size > 0 for size in patches):
        raise UserError(
            f"tokenizer.patch_sizes={patches} must be {len(present)} whole numbers, one for each stage of init"
        )
    # The widths of the transformers stay; the projections follow the patches.
    decoded = [patches[0] * (output_rate // rate), *patches[1:]]
    values["encoder_kwargs"] = rescale_patches(old.encoder_kwargs, patches, "input_dimension", "output_dimension")
    outwards = rescale_patches(old.decoder_kwargs[::-1], decoded, "output_dimension", "input_dimension")
    values["decoder_kwargs"] = outwards[::-1]
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
    """Return the patch sizes in the encoder's order."""
    return [entry["patch_size"] for entry in config.encoder_kwargs if "patch_size" in entry]


def rescale_patches(entries: list[dict[str, Any]], patches: list[int], outer: str, inner: str) -> list[dict[str, Any]]:
    """Return the entries, ordered from the waveform inwards, with new patch sizes; `outer` and `inner` are the keys of
    a stage's width towards the waveform and away from it.
    """
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
    """Copy into a module every weight of equal name and shape, preferring those `made` for it; the others stay.

    A tensor that the module has under several names counts once, under the first name.
    """
    made, every = made or {}, module.state_dict()
    first = {id(tensor): name for name, tensor in reversed(module.state_dict(keep_vars=True).items())}
    own = {name: every[name] for name in every if name in set(first.values())}
    sources = {name: made.get(name, weights.get(name)) for name in own}
    fits = {name: tensor for name, tensor in sources.items() if tensor is not None and tensor.shape == own[name].shape}
    for name, tensor in fits.items():
        own[name].copy_(tensor)
    return WeightReport(
        loaded=tuple(name for name in fits if name not in made),
        resampled=tuple(name for name in fits if name in made),
        new=tuple(name for name in own if name not in fits),
        unused=tuple(name for name in weights if name not in fits and (name in own or name not in every)),
    )


@dataclass(frozen=True)
class WaveformEnd:
    """Where an encoder or decoder meets the waveform: samples per patch (of all channels), rate in Hz, channels."""

    patch: int
    rate: int
    channels: int

    @property
    def samples(self) -> int:
        """Samples of one channel in a patch."""
        return self.patch // self.channels


def waveform_end(config: MossAudioTokenizerConfig, half: str) -> WaveformEnd:
    """Return the waveform end of a configuration's "encoder" or "decoder"."""
    is_encoder = half == "encoder"
    inwards = config.encoder_kwargs if is_encoder else config.decoder_kwargs[::-1]
    patch = next(entry["patch_size"] for entry in inwards if "patch_size" in entry)
    return WaveformEnd(
        patch, config.sampling_rate if is_encoder else config.output_sampling_rate, config.number_channels
    )


def resampled_projections(
    old: MossAudioTokenizerConfig, new: MossAudioTokenizerConfig, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return new weights, by name, for the projections at the waveform, computed from the old ones for another rate or
    other channels.

    If a patch lasts as long as before, the new encoder acts like the old one on the resampled waveform with its
    channels averaged, and the new decoder outputs the old one's waveform, resampled, on every channel. Other
    projections are left out.
    """
    inwards, outwards = new.encoder_kwargs, new.decoder_kwargs
    first = next(i for i, entry in enumerate(inwards) if "patch_size" not in entry)
    last = max(i for i, entry in enumerate(outwards) if "patch_size" not in entry)
    made = {}
    for name, resampled in (
        (f"encoder.{first}.input_proj.weight", resampled_input),
        (f"decoder.{last}.output_proj.weight", resampled_output),
    ):
        before, after = (waveform_end(config, name.partition(".")[0]) for config in (old, new))
        has_changed = (before.rate, before.channels) != (after.rate, after.channels)
        are_whole = before.patch % before.channels == after.patch % after.channels == 0
        lasts_as_long = Fraction(before.samples, before.rate) == Fraction(after.samples, after.rate)
        if name in weights and has_changed and are_whole and lasts_as_long:
            made[name] = resampled(weights[name], before, after)
    return made


def resampled_input(weight: Tensor, old: WaveformEnd, new: WaveformEnd) -> Tensor:
    """Return the weight [D, new patch] that resamples a patch to the old rate and applies the old [D, old patch]."""
    parts = weight.unflatten(1, (-1, old.channels))  # [D, samples, C]
    if old.channels != new.channels:
        parts = parts.sum(dim=2, keepdim=True).expand(-1, -1, new.channels) / new.channels
    if old.rate != new.rate:
        impulses = torch.eye(new.samples, dtype=weight.dtype)
        responses = resample(impulses, new.rate, old.rate)[:, : old.samples]
        parts = torch.einsum("dsc,ns->dnc", parts, responses)
    return parts.flatten(1)


def resampled_output(weight: Tensor, old: WaveformEnd, new: WaveformEnd) -> Tensor:
    """Return the weight [new patch, D] that applies the old [old patch, D] and resamples its patch to the new rate.

    The resampler's filter extends beyond a patch, into neighbouring patches that a projection has no access to. There
    the patch is extended by point reflection at its edge sample, which on speech comes closer to the resampled waveform
    than silence or linear interpolation.
    """
    parts = weight.unflatten(0, (-1, old.channels))  # [samples, C, D]
    if old.channels != new.channels:
        parts = parts.mean(dim=1, keepdim=True).expand(-1, new.channels, -1)
    if old.rate != new.rate:
        # Extend by whole units of both rates, so that the new samples lie where they would without the extension.
        unit, new_unit = (rate // math.gcd(old.rate, new.rate) for rate in (old.rate, new.rate))
        edge = min(-(-EDGE // unit), (old.samples - 1) // unit)
        count, waves = edge * unit, parts.movedim(0, 2)
        before = 2 * waves[..., :1] - waves[..., 1 : count + 1].flip(-1)
        after = 2 * waves[..., -1:] - waves[..., waves.shape[-1] - 1 - count : -1].flip(-1)
        waves = resample(torch.cat((before, waves, after), dim=-1).contiguous(), old.rate, new.rate)
        parts = waves[..., edge * new_unit :][..., : new.samples].movedim(2, 0)
    return parts.flatten(0, 1)
