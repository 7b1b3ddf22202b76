"""The joint objective: tensors in, named terms out; no optimizer, no Lightning.

Every term is a loss with a name and a weight. Its value is a sum over clips divided by a count over the whole update,
so the values of micro-batches and ranks add up. The term `semantic` comes from the text LM, all others from `losses`.
Instead of weights, the configuration can set each term's share of the gradient at the decoder's output (EnCodec, arXiv
2210.13438, section 3.4): gradient norms of terms differ by orders of magnitude, so a weight says little about how much
a term moves the decoder.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moss_train.batch import Batch
from moss_train.config import recipe_schema
from moss_train.config.build import build, resolve_target
from moss_train.discriminators import DiscriminatorOutput
from moss_train.losses import AdversarialLoss, AudioLoss, QuantizerLoss
from moss_train.losses.adversarial import AdversarialReduction, FeatureReduction
from moss_train.model.quantizer import QuantizerOutput
from moss_train.training.step.schedule import ScheduleState, Stage

REFERENCE = "reconstruction"
SMALLEST_NORM = 1e-12  # a term with a smaller gradient norm counts as having no gradient
RMS_FLOOR = 1e-3  # added to the RMS of a crop, so that the noise of pauses is not scaled up to the level of speech


class GradientBalancer:
    """Replaces the weights of some terms, so that each one's gradient has a given share of their total.

    The total is the gradient norm that the reconstruction alone would have with its own weight, so that terms without a
    share (commitment, codebook, semantic and others) keep their proportion to it. A term's gradient norm is measured at
    the decoder's output, over all clips of an update, and averaged over updates (running mean). It is known only after
    the update, so a term is included from the second update in which it is computed. Terms with weight 0 are left out,
    and the shares of the computed terms are scaled to sum to 1. The shares of adversarial terms rise from 0 with their
    ramp.

    Args:
        shares: share of each term, by name; only ratios count.
        names: terms that are computed from the decoder's output.
        decay: decay of the running mean, per update.

    Raises:
        ValueError: the reconstruction has no share, a term is unknown, or a share is not above 0.
    """

    def __init__(self, shares: Mapping[str, float], names: Sequence[str], decay: float = 0.999) -> None:
        if unknown := set(shares) - set(names):
            raise ValueError(f"objective.balance: {sorted(unknown)} not among the decoder's terms {sorted(names)}")
        if REFERENCE not in shares:
            raise ValueError(f"objective.balance needs a share for {REFERENCE}: the others are measured by it")
        for name, share in shares.items():
            is_number = isinstance(share, int | float) and not isinstance(share, bool)
            if not is_number or not 0 < share < math.inf:
                raise ValueError(f"objective.balance.{name}={share} has to be a number above 0")
        self.shares = dict(shares)
        self.decay = decay
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def norm(self, name: str) -> float:
        """Return the running mean of a term's gradient norm, 0 before its first measurement."""
        return self.sums[name] / self.counts[name] if name in self.sums else 0.0

    def weights(self, weights: Mapping[str, float], ramps: Mapping[str, float]) -> dict[str, float]:
        """Return the weights with those of the balanced terms replaced.

        Args:
            weights: weights of the terms that are computed in this update.
            ramps: factors on the shares, by term; 1 for terms not named.
        """
        shares = {name: share * ramps.get(name, 1.0) for name, share in self.shares.items() if weights.get(name)}
        if REFERENCE not in shares:
            return dict(weights)
        known = {name for name in shares if name == REFERENCE or self.norm(name) > SMALLEST_NORM}
        total = sum(shares[name] for name in known)
        whole = weights[REFERENCE] * self.norm(REFERENCE) / total
        balanced = {
            name: whole * shares[name] / self.norm(name) if name in known else 0.0
            for name in shares
            if name != REFERENCE
        }
        return {**weights, **balanced, REFERENCE: weights[REFERENCE] * shares[REFERENCE] / total}

    def add(self, norms: Mapping[str, float]) -> None:
        """Add the gradient norms of an update's terms, before weighting, to the running means."""
        for name in self.shares.keys() & norms.keys():
            self.sums[name] = self.decay * self.sums.get(name, 0.0) + norms[name]
            self.counts[name] = self.decay * self.counts.get(name, 0.0) + 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return the running means."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the running means."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


SEMANTIC = "semantic"
WEIGHTS = {name: weight or 0.0 for name, weight in recipe_schema.WEIGHTS.items()}
LOSSES = recipe_schema.LOSSES


@dataclass(frozen=True)
class UpdateCounts:
    """Denominators of the terms of one update.

    Attributes:
        clips: number of clips.
        text_tokens: number of tokens of all texts that are used.
        audio: denominator of each audio loss, by name (see `AudioLoss.counts`).
    """

    clips: Tensor
    text_tokens: Tensor
    audio: Mapping[str, Tensor]

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> "UpdateCounts":
        """Return the counts after a single call of `reduce`, on all of them in one float64 vector."""
        parts = [self.clips, self.text_tokens, *self.audio.values()]
        vector = reduce(torch.cat([part.reshape(-1) for part in parts]).double())
        pieces = vector.split([part.numel() for part in parts])
        clips, text_tokens, *audio = (piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))
        return UpdateCounts(clips, text_tokens, dict(zip(self.audio, audio, strict=True)))


class Objective(nn.Module):
    """Loss terms of generator and discriminators, and their weights (MOSS-TTS report, arXiv 2603.18090, section 3).

    Args:
        sampling_rate: sampling rate of the decoder's output in Hz.
        weights: weights by term, where they differ from WEIGHTS; they override the `weight` of a loss's node.
        discriminator_crop_seconds: length of the random crop of each clip that the discriminators get.
        discriminator_pre_emphasis: coefficient a of the filter x[t] - a x[t-1] applied to these crops; 0 is none.
        discriminator_unit_rms: divide these crops, recorded and generated, by the RMS of the recorded one.
        quantizer_dropout: share of clips that use a random prefix of the levels (1.0 in the paper); the others use all.
        adversarial_reduction: reduction of the LSGAN losses over sub-discriminators, "mean" (the paper) or "sum"
            (public code).
        feature_reduction: reduction of feature matching, "relative_mean" or "absolute_sum" (see
            `feature_matching_loss`).
        balance: share of each term in the gradient at the decoder's output (see `GradientBalancer`); None uses the
            weights as they are.
        losses: configuration nodes by name, with `_target_`, `weight` and arguments. A node without `_target_` changes
            arguments of the default loss of that name; None removes the loss.

    Raises:
        ValueError: a term, reduction or share is unknown, or a value is out of range.
        UserError: a loss cannot be built.
    """

    def __init__(
        self,
        sampling_rate: int,
        weights: Mapping[str, float] | None = None,
        discriminator_crop_seconds: float = 1.0,
        discriminator_pre_emphasis: float = 0.0,
        discriminator_unit_rms: bool = False,
        quantizer_dropout: float = 1.0,
        adversarial_reduction: AdversarialReduction = "mean",
        feature_reduction: FeatureReduction = "relative_mean",
        balance: Mapping[str, float] | None = None,
        losses: Mapping[str, Mapping[str, Any] | None] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= quantizer_dropout <= 1:
            raise ValueError(f"objective.quantizer_dropout={quantizer_dropout} has to be from 0 to 1")
        nodes: dict[str, dict[str, Any]] = {name: dict(node) for name, node in LOSSES.items()}
        nodes["adversarial"]["reduction"], nodes["feature"]["reduction"] = adversarial_reduction, feature_reduction
        for name, changes in (losses or {}).items():
            if changes is None:
                nodes.pop(name, None)
            elif "_target_" in changes and changes["_target_"] != nodes.get(name, {}).get("_target_"):
                nodes[name] = dict(changes)
            else:
                nodes[name] = {**nodes.get(name, {}), **changes}
        self.losses = nn.ModuleDict({name: build_loss(name, node, sampling_rate) for name, node in nodes.items()})
        own = {name: float(node["weight"]) for name, node in nodes.items() if "weight" in node}
        known = {name: WEIGHTS.get(name, 0.0) for name in (SEMANTIC, *nodes)}
        given = {name: weight for name, weight in (weights or {}).items() if weight is not None}
        self.weights = with_weights(known | own, given)
        self.quantizer_dropout = quantizer_dropout
        self.crop_length = round(discriminator_crop_seconds * sampling_rate)
        self.pre_emphasis, self.unit_rms = discriminator_pre_emphasis, discriminator_unit_rms
        self.balancer = None if balance is None else GradientBalancer(balance, self.output_names)

    def _names(self, kind: type[nn.Module]) -> tuple[str, ...]:
        return tuple(name for name, loss in self.losses.items() if isinstance(loss, kind))

    @property
    def names(self) -> tuple[str, ...]:
        """All terms of the generator."""
        return tuple(self.weights)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Terms that are computed from the decoder's output."""
        return (*self._names(AudioLoss), *self._names(AdversarialLoss))

    @property
    def trains_discriminators(self) -> bool:
        """Whether a loss trains the discriminators; an adversarial stage needs one."""
        return any(hasattr(loss, "discriminator_loss") for loss in self.losses.values())

    def stage_weights(self, stage: Stage) -> dict[str, float]:
        """Return the weight of every term in a stage."""
        return with_weights(self.weights, stage.weights)

    def generator_passes(self, stage: Stage) -> int:
        """Return the number of backward passes through the discriminators for the generator's terms in an update."""
        weights = self.stage_weights(stage)
        num_terms = sum(bool(weights[name]) for name in self._names(AdversarialLoss))
        return num_terms if self.balancer is not None else min(num_terms, 1)

    def active_weights(self, schedule_state: ScheduleState) -> dict[str, float]:
        """Return the weights of the terms that an update computes: those with a weight other than 0 in its stage.

        Adversarial terms are included once the discriminators' warm-up is over, and their weights rise along the ramp.
        A balancer replaces some of the weights.
        """
        ramps = dict.fromkeys(self._names(AdversarialLoss), schedule_state.adversarial_ramp)
        weights = {
            name: weight * ramps.get(name, 1.0)
            for name, weight in self.stage_weights(schedule_state.stage).items()
            if weight and (schedule_state.adversarial_loss_active or name not in ramps)
        }
        return weights if self.balancer is None else self.balancer.weights(weights, ramps)

    def num_quantizers(self, batch: Batch, available: int) -> Tensor:
        """Return how many of the `available` levels each clip uses, [B] int64: all, or uniform over 1 ... available."""
        share = self.quantizer_dropout
        units = batch.quantizer_uniform.double()
        prefix = 1 + (units / max(share, 1e-9) * available).long()
        return torch.where(units < share, prefix, available).clamp(max=available)

    def count(self, batches: Sequence[Batch], device: torch.device | str = "cpu") -> UpdateCounts:
        """Return the counts of one rank's micro-batches; the sequence may be empty."""
        none = torch.zeros(0, dtype=torch.int64, device=device)
        lengths = torch.cat([none, *(batch.reference_lengths for batch in batches)])
        text = torch.cat([none, *(batch.text_lengths for batch in batches)])
        audio = {name: self.losses[name].counts(lengths) for name in self._names(AudioLoss)}  # type: ignore[operator]
        return UpdateCounts(torch.ones_like(lengths).sum(), text.sum(), audio)

    def audio_terms(
        self, batch: Batch, reconstruction: Tensor, counts: UpdateCounts, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Compute the terms in `weights` that compare the recording with the reconstruction [B, C, T]."""
        arguments = (batch.reference, reconstruction, batch.reference_lengths)
        names = [name for name in self._names(AudioLoss) if name in weights]
        return {name: self.losses[name](*arguments, counts.audio[name]) for name in names}

    def quantizer_terms(
        self, quantized: QuantizerOutput, frame_mask: Tensor, counts: UpdateCounts, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Compute the quantizer's terms that are in `weights`; frame_mask [B, F] bool, true for valid frames."""
        arguments = (quantized.latents, quantized.codewords, frame_mask, quantized.level_mask, counts.clips)
        return {name: self.losses[name](*arguments) for name in self._names(QuantizerLoss) if name in weights}

    def adversarial_terms(
        self,
        real: Sequence[DiscriminatorOutput],
        generated: Sequence[DiscriminatorOutput],
        counts: UpdateCounts,
        weights: Mapping[str, float],
    ) -> dict[str, Tensor]:
        """Compute the generator's terms in `weights` from the discriminators' outputs."""
        names = [name for name in self._names(AdversarialLoss) if name in weights]
        return {name: self.losses[name](real, generated, counts.clips) for name in names}

    def discriminator_loss(
        self, real: Sequence[DiscriminatorOutput], generated: Sequence[DiscriminatorOutput], counts: UpdateCounts
    ) -> Tensor:
        """Compute the discriminators' own loss, to be differentiated with respect to their parameters only."""
        losses: list[Any] = [loss for loss in self.losses.values() if hasattr(loss, "discriminator_loss")]
        return torch.stack([loss.discriminator_loss(real, generated, counts.clips) for loss in losses]).sum()

    def crop(self, audio: Tensor, batch: Batch) -> Tensor:
        """Crop each clip for the discriminators: [B, C, T] -> [B, C, crop_length].

        The clip's own random number selects the start, within its valid samples; a shorter clip is zero-padded.
        """
        length = self.crop_length
        room = (batch.reference_lengths - length).clamp(min=0)
        start = (batch.crop_uniform.double() * (room + 1)).long()
        index = start[:, None] + torch.arange(length, device=audio.device)
        valid = index < batch.reference_lengths[:, None]
        index = index.clamp(max=audio.shape[2] - 1)[:, None].expand(-1, audio.shape[1], -1)
        return audio.gather(2, index) * valid[:, None]

    def discriminator_input(self, audio: Tensor, batch: Batch) -> Tensor:
        """Crop, pre-emphasise and scale the recording or its reconstruction for the discriminators.

        audio [B, C, T] -> [B, C, crop_length]. Without both, most of what discriminators get is the strong sound below
        1 kHz at a level far below that of their initial weights, and they learn slowly. A reconstruction that is loud
        where the recording is silent becomes very large, so the tokenizer should have learned pauses before.
        """
        crop = self._emphasized_crop(audio, batch)
        if not self.unit_rms:
            return crop
        recorded = crop if audio is batch.reference else self._emphasized_crop(batch.reference, batch)
        return crop / (recorded.square().mean((1, 2), keepdim=True).sqrt() + RMS_FLOOR)

    def _emphasized_crop(self, audio: Tensor, batch: Batch) -> Tensor:
        crop = self.crop(audio, batch)
        if not self.pre_emphasis:
            return crop
        return torch.cat((crop[..., :1], crop[..., 1:] - self.pre_emphasis * crop[..., :-1]), dim=-1)


def build_loss(name: str, node: Mapping[str, Any], sampling_rate: int) -> nn.Module:
    """Build a loss from its node, with the decoder's sampling rate if it takes one.

    Raises UserError when it cannot be built and ValueError when it is another kind of module.
    """
    path = f"objective.losses.{name}"
    arguments = {key: value for key, value in node.items() if key != "weight"}
    takes_rate = "sampling_rate" in inspect.signature(resolve_target(node.get("_target_", ""), path)).parameters
    given = {"sampling_rate": sampling_rate} if takes_rate and "sampling_rate" not in node else {}
    loss = build(arguments, path=path, **given)
    if not isinstance(loss, AudioLoss | QuantizerLoss | AdversarialLoss):
        raise ValueError(f"{path}: {node['_target_']} is no AudioLoss, QuantizerLoss or AdversarialLoss")
    return loss


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the sum of the terms, each times its weight; there has to be at least one."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def with_weights(weights: Mapping[str, float], changes: Mapping[str, float]) -> dict[str, float]:
    """Return the weights with `changes` applied. Raises ValueError for an unknown term."""
    if unknown := changes.keys() - weights.keys():
        raise ValueError(f"weights: unknown term {sorted(unknown)}, there are {sorted(weights)}")
    return {**weights, **changes}


SCORES = ("discriminator_score/real", "discriminator_score/generated")


def count_codes(codes: Tensor, frame_mask: Tensor, codebook_size: int) -> Tensor:
    """Count how often each code of each level was chosen: [N, V] int64, on the device of the codes.

    codes [N, B, F], frame_mask [B, F] bool, true for valid frames. Quantizer dropout makes no difference: every level
    chooses codes, used or not.
    """
    counts = torch.zeros(len(codes), codebook_size, dtype=torch.int64, device=codes.device)
    valid = frame_mask.flatten().to(torch.int64).expand(len(codes), -1)
    return counts.scatter_add_(1, codes.flatten(1), valid)


def mean_scores(
    real: Sequence[DiscriminatorOutput], generated: Sequence[DiscriminatorOutput], num_clips: Tensor | int
) -> dict[str, Tensor]:
    """Return the mean score of real and of generated audio; perfect discriminators score 1 and 0.

    Scores are averaged within a clip, then over sub-discriminators, then over the clips of the whole update, as losses
    are.
    """
    return {
        name: torch.stack([output.logits.detach().float().flatten(1).mean(1) for output in outputs]).mean(0).sum()
        / num_clips
        for name, outputs in zip(SCORES, (real, generated), strict=True)
    }


def gradient_shares(norms: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Return each term's share of the gradient at the decoder's output, from gradient norms before weighting.

    A share is the term's weighted norm divided by the sum of all; the result is empty when no term has a gradient.
    """
    weighted = {name: weights[name] * norm for name, norm in norms.items()}
    total = sum(weighted.values())
    return {name: norm / total for name, norm in weighted.items()} if total else {}
