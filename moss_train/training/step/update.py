"""One update, from a batch to the step of the optimizers, in the order of section 3 of arXiv 2603.18090 (MOSS-TTS).

Encode, quantize, decode; reconstruction terms; text term; adversarial terms; backward; sum over ranks; clip; step.
All inputs are arguments, and the outcome is returned as an `UpdateResult`. The only global side effect is that
autocast's weight cache is off from the first update on.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moss_train.batch import Batch, UpdateBatch
from moss_train.discriminators import DiscriminatorSet
from moss_train.model import MossAudioTokenizerModel
from moss_train.semantic import TextLM
from moss_train.training.distributed.collectives import (
    GradientSums,
    max_over_ranks,
    num_ranks,
    read_by_name,
    sum_by_name,
    sum_over_ranks,
)
from moss_train.training.distributed.fsdp import is_sharded
from moss_train.training.step.accumulation import Accumulation
from moss_train.training.step.objective import (
    SCORES,
    SEMANTIC,
    Objective,
    UpdateCounts,
    count_codes,
    mean_scores,
    weighted_sum,
)
from moss_train.training.step.optimizers import squared_norm, step_clipped
from moss_train.training.step.quantizer_start import pass_unquantized
from moss_train.training.step.schedule import ScheduleState

Backward = Callable[..., None]
"""Like `torch.Tensor.backward`, with the loss as first argument."""


@dataclass(frozen=True)
class Networks:
    """The networks of the joint training; `is_sharded` if tokenizer and text LM are sharded over the ranks."""

    tokenizer: MossAudioTokenizerModel
    text_lm: TextLM | None
    discriminators: DiscriminatorSet | None
    is_sharded: bool = False

    @property
    def with_layers(self) -> list[nn.Module]:
        """Networks that are made of transformer layers."""
        return [self.tokenizer] if self.text_lm is None else [self.tokenizer, self.text_lm]


@dataclass(frozen=True)
class OptimizerGroup:
    """One optimizer with the parameters that it updates.

    Attributes:
        name: generator or discriminators.
        optimizer: Lightning's wrapper of the optimizer.
        learning_rate: learning rate of this update.
        clip_norm: maximum norm of the gradient of all parts together.
        parts: parameters by name of the part.
    """

    name: str
    optimizer: Any
    learning_rate: float
    clip_norm: float
    parts: Mapping[str, Sequence[nn.Parameter]]


@dataclass(frozen=True)
class UpdateResult:
    """Outcome of an update; the same on every rank, except for `code_counts`.

    Attributes:
        metrics: losses, norms and rates, named like the columns of `metrics.csv`.
        weights: weights with which the computed terms were used.
        output_norms: norm of each term's gradient at the decoder's output, before weighting; empty if not measured.
        sums: the `local_numbers`, summed over the ranks.
        code_counts: how often each code of each level was chosen on this rank, [N, V] int64, on the device.
        num_clips: number of clips on all ranks together.
    """

    metrics: dict[str, float]
    weights: dict[str, float]
    output_norms: dict[str, float]
    sums: dict[str, float]
    code_counts: Tensor
    num_clips: int

    @property
    def not_finite(self) -> list[str]:
        """Names of the metrics that are not finite; if there are any, the optimizers did not step."""
        return [name for name, value in self.metrics.items() if not math.isfinite(value)]


@dataclass(frozen=True)
class MicroBatchResult:
    """A micro-batch's contribution to the update's numbers, detached, on the device.

    Attributes:
        terms: losses and scores, named like the columns of `metrics.csv`.
        output_squares: squared norm of each term's gradient at the decoder's output, before weighting.
        code_counts: see `UpdateResult`.
    """

    terms: dict[str, Tensor]
    output_squares: dict[str, Tensor]
    code_counts: Tensor


def run_update(
    networks: Networks,
    objective: Objective,
    groups: Sequence[OptimizerGroup],
    backward: Backward,
    batch: UpdateBatch,
    schedule_state: ScheduleState,
    local_numbers: Callable[[UpdateBatch], Mapping[str, float]] = lambda batch: {},
    reduce_dtype: torch.dtype | None = None,
    measure_shares: bool = False,
) -> UpdateResult:
    """Do one update: sum the gradients of all micro-batches and ranks, then step every optimizer once, or none.

    Args:
        groups: the optimizers that step in this update.
        local_numbers: returns this rank's numbers that are summed over the ranks, with the same names on every rank.
            It is called after the backward passes, so that a signal received during them is included.
        reduce_dtype: dtype in which gradients are reduced between ranks; None is float32.
        measure_shares: whether to measure the gradients at the decoder's output; with a balancer they always are.
    """
    device = networks.tokenizer.device
    weights = objective.active_weights(schedule_state)
    counts = objective.count(batch.micro_batches, device).reduced(sum_over_ranks)

    num_own = num_turns = len(batch.micro_batches)
    if networks.is_sharded:
        # Before the passes: after them, a rank without more micro-batches would wait here for the others, which wait
        # for it inside their passes.
        num_turns = max_over_ranks(num_own, device)
    # No cache of casts in autocast: FSDP2 would add the last micro-batch's gradient of a cached copy one update late,
    # and a copy that two passes share would sum their gradients in bfloat16. Layers' weights are cast once, below.
    torch.set_autocast_cache_enabled(False)
    parts = {name: list(part) for group in groups for name, part in group.parts.items()}
    parameters = [parameter for part in parts.values() for parameter in part]
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    accumulation = Accumulation(networks.with_layers, parameters, dtype)
    # Gradients of replicated networks are summed over ranks during the last backward passes; FSDP2 sums sharded ones.
    large = accumulation.large_leaves
    parts_to_sum = [list(accumulation.small_leaves), *([p for p in part if p in large] for part in parts.values())]
    sums_of_gradients = GradientSums([[p for p in part if not is_sharded(p)] for part in parts_to_sum], reduce_dtype)
    of_text_lm = [] if networks.text_lm is None else list(networks.text_lm.parameters())
    results = []
    with accumulation.copies_in_place():
        for turn, micro_batch in enumerate(batch.micro_batches):
            is_last = turn == num_own - 1 and not networks.is_sharded
            has_text = SEMANTIC in weights and bool(((micro_batch.host or micro_batch).text_lengths > 0).any())
            unused = [] if has_text else of_text_lm
            with sums_of_gradients.beside_backward(large, unused) if is_last else nullcontext():
                results.append(
                    forward_backward(
                        networks, objective, micro_batch, counts, schedule_state, weights, backward, measure_shares
                    )
                )
            accumulation.add_small()
        for _ in range(num_turns - num_own):
            dummy_forward_backward(networks, schedule_state, backward)
    accumulation.finish()
    terms = add_up([result.terms for result in results])
    squares = add_up([result.output_squares for result in results])

    # One collective sums all numbers. Clip factors and the finiteness check are computed from them on the device, so
    # the step is queued right behind the passes; only then does the host wait, once, to read the numbers.
    sums_of_gradients.finish()
    is_missing = {
        str(i): p in sums_of_gradients.missing or p.grad is None for i, p in enumerate(parameters) if num_ranks() > 1
    }
    zero = torch.zeros((), device=device)
    names = [f"loss/{name}" for name in (*objective.names, "generator", "discriminators")] + ["text_accuracy", *SCORES]
    num_own_clips = sum(micro_batch.num_clips for micro_batch in batch.micro_batches)
    numbers: dict[str, Mapping[str, Tensor | float]] = {
        "terms": {name: terms.get(name, zero) for name in names},
        "has_term": {name: name in terms for name in names},  # a term that any rank has is logged
        "output_squares": {name: squares.get(name, zero) for name in objective.output_names},
        "has_square": {name: name in squares for name in objective.output_names},
        "part_squares": {name: share_of_square(part).to(device) for name, part in parts.items()},
        "missing": is_missing,
        "local_numbers": local_numbers(batch),
        "num_clips": {"": num_own_clips},
    }
    sums = sum_by_name(numbers, device)
    is_finite = sums["terms"].isfinite().all() & sums["part_squares"].isfinite().all()
    squares_of_part = dict(zip(parts, sums["part_squares"].unbind(), strict=True))
    group_norms = [sum((squares_of_part[name] for name in group.parts), zero.double()).sqrt() for group in groups]
    clip_factors = [
        (group.clip_norm / (norm + 1e-6)).clamp(max=1.0) for group, norm in zip(groups, group_norms, strict=True)
    ]
    sums |= {"group_norms": torch.stack(group_norms), "clip_factors": torch.stack(clip_factors)}
    names_of: dict[str, Iterable[str]] = {kind: values.keys() for kind, values in numbers.items()}
    names_of |= {key: [group.name for group in groups] for key in ("group_norms", "clip_factors")}

    totals = None
    lacks_text = networks.text_lm is not None and f"loss/{SEMANTIC}" not in terms
    if num_ranks() > 1 and (num_own_clips == 0 or lacks_text or any(is_missing.values())):
        # Which parameters step depends on the other ranks, so the numbers are read before the step here. A parameter
        # that has no gradient on any rank gets none, as in one process: a gradient of zeros would decay its moments.
        totals = read_by_name(sums, names_of)
        for parameter, ranks_without in zip(parameters, totals["missing"].values(), strict=True):
            if ranks_without == num_ranks():
                parameter.grad = None
        if networks.text_lm is not None and not totals["has_term"][f"loss/{SEMANTIC}"]:
            networks.text_lm.zero_grad(set_to_none=True)  # gradients that dummy passes left
    if num_own_clips or (totals is not None and totals["num_clips"][""]):
        for group, factor in zip(groups, clip_factors, strict=True):
            step_clipped(group.optimizer, group.learning_rate, factor, is_finite)
    for group in groups:
        group.optimizer.zero_grad(set_to_none=True)
    totals = totals or read_by_name(sums, names_of)

    metrics = {name: value for name, value in totals["terms"].items() if totals["has_term"][name]}
    num_clips = round(totals["num_clips"][""])
    if num_clips:
        metrics |= {f"gradient_norm/{name}": math.sqrt(square) for name, square in totals["part_squares"].items()}
    for group in groups if num_clips else ():
        metrics |= {
            f"gradient_norm/{group.name}": totals["group_norms"][group.name],
            f"clip_factor/{group.name}": totals["clip_factors"][group.name],
            f"learning_rate/{group.name}": group.learning_rate,
        }
    return UpdateResult(
        metrics,
        weights,
        output_norms={
            name: math.sqrt(value) for name, value in totals["output_squares"].items() if totals["has_square"][name]
        },
        sums=totals["local_numbers"],
        code_counts=sum((result.code_counts for result in results), no_codes(networks.tokenizer)),
        num_clips=num_clips,
    )


def forward_backward(
    networks: Networks,
    objective: Objective,
    batch: Batch,
    counts: UpdateCounts,
    schedule_state: ScheduleState,
    weights: Mapping[str, float],
    backward: Backward,
    measure_shares: bool = False,
) -> MicroBatchResult:
    """Run one micro-batch forward and backward, and accumulate the gradients of generator and discriminators.

    The graph is cut at the decoder's output: each group of terms is differentiated down to a detached copy of the
    output, and the sum of these gradients then goes through decoder, quantizer and encoder in the generator's only
    backward pass.

    The discriminators run once on real and once on generated audio, for the losses of both sides. The cost in units of
    one forward pass of all discriminators (a backward pass to the weights or to the inputs is one unit each): 2 for
    forward, 4 for their own loss, 1 for the generator's terms (1 per term when gradients are measured or balanced).

    Args:
        weights: weights of the terms to compute.
    """
    tokenizer, text_lm, discriminators = networks.tokenizer, networks.text_lm, networks.discriminators

    # Encode, quantize with a prefix of the levels, decode.
    latent = tokenizer.encode_latent(batch.audio)
    if schedule_state.stage.quantize:
        quantized = tokenizer.quantizer(latent, objective.num_quantizers(batch, tokenizer.config.num_quantizers))
    else:
        quantized = pass_unquantized(tokenizer.quantizer, latent)
    reconstruction = tokenizer.decode_latent(quantized.quantized).float()
    output = reconstruction.detach().requires_grad_()
    num_frames = tokenizer.num_frames(batch.audio_lengths)
    frame_mask = torch.arange(latent.shape[1], device=latent.device) < num_frames[:, None]
    observed: dict[str, Tensor] = {}

    # Reconstruction terms and those of the quantizer.
    output_terms = objective.audio_terms(batch, output, counts, weights)
    gradient, squares = output_gradient(output_terms, weights, output, objective, measure_shares)
    inner_terms = objective.quantizer_terms(quantized, frame_mask, counts, weights)

    # Text term, for the clips that have a text. Lengths are read from the host's copy, without waiting for the device.
    host = batch.host or batch
    with_text = (host.text_lengths > 0).nonzero()[:, 0]
    states = quantized.quantized if schedule_state.text_lm_trains_tokenizer else quantized.quantized.detach()
    through_text_lm = None
    if text_lm is not None and SEMANTIC in weights and len(with_text):
        chosen = with_text.to(states.device, non_blocking=True)
        prediction = text_lm(
            states[chosen],
            tokenizer.num_frames(host.audio_lengths[with_text]).tolist(),
            batch.text_tokens[chosen],
            host.text_lengths[with_text].tolist(),
            batch.task_ids[chosen],
        )
        inner_terms[SEMANTIC] = prediction.loss_sum / counts.text_tokens.clamp(min=1)
        observed["text_accuracy"] = prediction.num_correct / counts.text_tokens.clamp(min=1)
    elif text_lm is not None and networks.is_sharded:
        through_text_lm = zero_loss_through_text_lm(text_lm, states)

    # Adversarial terms, and the discriminators' own loss, which is backpropagated to their weights only.
    if discriminators is not None and (schedule_state.adversarial_loss_active or schedule_state.discriminators_learn):
        discriminators.requires_grad_(schedule_state.discriminators_learn)
        with torch.set_grad_enabled(schedule_state.discriminators_learn):
            real = discriminators(objective.discriminator_input(batch.reference, batch))
        generated = discriminators(
            objective.discriminator_input(output if schedule_state.adversarial_loss_active else output.detach(), batch)
        )
        observed |= mean_scores(real, generated, counts.clips)
        if schedule_state.discriminators_learn:
            own_loss = objective.discriminator_loss(real, generated, counts)
            observed["loss/discriminators"] = own_loss
            backward(
                own_loss, inputs=list(discriminators.parameters()), retain_graph=schedule_state.adversarial_loss_active
            )
        if schedule_state.adversarial_loss_active:
            adversarial_terms = objective.adversarial_terms(real, generated, counts, weights)
            more, more_squares = output_gradient(adversarial_terms, weights, output, objective, measure_shares)
            gradient, squares = gradient + more, squares | more_squares
            output_terms |= adversarial_terms

    # Backward pass, from the gradient at the decoder's output and the terms inside the model.
    total = (reconstruction * gradient).sum()
    if inner_terms:
        total = total + weighted_sum(inner_terms, weights)
    backward(total if through_text_lm is None else total + through_text_lm)

    terms = {**inner_terms, **output_terms}
    observed |= {f"loss/{name}": value for name, value in terms.items()}
    if terms:
        observed["loss/generator"] = weighted_sum({name: value.detach() for name, value in terms.items()}, weights)
    codes = no_codes(tokenizer)
    if schedule_state.stage.quantize:
        codes = count_codes(quantized.codes, frame_mask, tokenizer.config.quantizer_kwargs["codebook_size"])
    return MicroBatchResult({name: value.detach() for name, value in observed.items()}, squares, codes)


def output_gradient(
    terms: Mapping[str, Tensor], weights: Mapping[str, float], output: Tensor, objective: Objective, measure: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the gradient of the weighted terms with respect to the decoder's output [B, C, T]; frees their graph.

    Also returns the squared norm of each term's gradient before weighting, if terms are balanced or `measure` is set.
    Clips do not share outputs, so the squares of micro-batches and ranks add up. Measuring leaves every bit of the
    gradient as it is.
    """
    if not terms:
        return torch.zeros_like(output), {}
    is_balanced = objective.balancer is not None
    each: dict[str, Tensor] = {}
    with torch.autocast(output.device.type, enabled=False):
        if is_balanced or measure:
            last = list(terms)[-1] if is_balanced else None
            each = {
                name: torch.autograd.grad(term, output, retain_graph=name != last)[0] for name, term in terms.items()
            }
        squares = {name: gradient.square().sum() for name, gradient in each.items()}
        if is_balanced:
            return sum((weights[name] * gradient for name, gradient in each.items()), torch.zeros_like(output)), squares
        return torch.autograd.grad(weighted_sum(terms, weights), output)[0], squares


def dummy_forward_backward(networks: Networks, schedule_state: ScheduleState, backward: Backward) -> None:
    """Run the sharded networks forward and backward with a loss of zero, while other ranks have one more micro-batch.

    Every pass of a sharded network is a collective that all ranks have to join with the same parameters. So the levels
    of the quantizer are skipped here, too, if the stage does not quantize.
    """
    tokenizer = networks.tokenizer
    silence = torch.zeros(
        1, tokenizer.config.number_channels, tokenizer.config.downsample_rate, device=tokenizer.device
    )
    latent = tokenizer.encode_latent(silence)
    quantize = tokenizer.quantizer if schedule_state.stage.quantize else partial(pass_unquantized, tokenizer.quantizer)
    states = quantize(latent).quantized
    total = 0.0 * tokenizer.decode_latent(states).sum()
    if networks.text_lm is not None:
        states = states if schedule_state.text_lm_trains_tokenizer else states.detach()
        total = total + zero_loss_through_text_lm(networks.text_lm, states)
    backward(total)


def zero_loss_through_text_lm(text_lm: TextLM, states: Tensor) -> Tensor:
    """Return a loss of zero that depends on the text LM: in every micro-batch, either all ranks have to run it or none.

    During the text LM's warm-up, callers pass detached states, because otherwise its gradients would be reduced in
    another order than on ranks that have text.
    """
    zero = torch.zeros(1, dtype=torch.int64, device=states.device)
    return 0.0 * text_lm(states[:1, :1], [1], zero[None], [1], zero).loss_sum


def add_up(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sum tensors name by name; a part may lack some names."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.stack([part[name] for part in parts if name in part]).sum() for name in names}


def share_of_square(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return this rank's contribution to the squared norm of gradients: that of its shards in full, that of replicated
    parameters divided by the number of ranks.
    """
    held = [p for p in parameters if is_sharded(p)]
    common = [p for p in parameters if not is_sharded(p)]
    return squared_norm(held) + squared_norm(common) / num_ranks()


def no_codes(tokenizer: MossAudioTokenizerModel) -> Tensor:
    """Return code counts that are all zero, [N, V] int64."""
    sizes = (tokenizer.config.num_quantizers, tokenizer.config.quantizer_kwargs["codebook_size"])
    return torch.zeros(sizes, dtype=torch.int64, device=tokenizer.device)
