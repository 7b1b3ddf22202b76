"""Forward and backward of one micro-batch: the terms of the generator, and the judgement of the discriminators."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moss_train.batch import Batch
from moss_train.training.step.diagnostics import mean_logits, squared_output_gradients, weights_at
from moss_train.training.step.objective import UpdateCounts
from moss_train.training.step.schedule import StageMoment

if TYPE_CHECKING:
    from moss_train.training.module import CatModule


@dataclass(frozen=True)
class Judgement:
    """What the discriminators add to a micro-batch.

    Attributes:
        terms: the generator's adversarial terms; empty in the head start.
        weighted: their weighted sum, detached.
        surrogate: scalar whose gradient in the reconstruction is that of `weighted`.
        loss: of the discriminators; None when they do not learn in this update.
        observed: what is reported besides.
    """

    terms: dict[str, Tensor]
    weighted: Tensor
    surrogate: Tensor
    loss: Tensor | None
    observed: dict[str, Tensor]


def accumulate(module: "CatModule", batch: Batch, counts: UpdateCounts, moment: StageMoment) -> dict[str, Tensor]:
    """Add the gradients of one micro-batch on both sides; returns its share of every term, detached."""
    tokenizer = module.tokenizer
    latent = tokenizer.encode_latent(batch.audio)
    quantized = tokenizer.quantizer(latent, module.num_quantizers(batch))
    reconstruction = tokenizer.decode_latent(quantized.quantized)
    num_frames = tokenizer.num_frames(batch.audio_lengths)
    frame_mask = torch.arange(latent.shape[1], device=latent.device) < num_frames[:, None]
    module.code_counts.add(quantized.codes, frame_mask)
    terms = module.objective.codec_terms(batch, reconstruction, quantized, frame_mask, counts, moment.stage.weights)
    reported: dict[str, Tensor] = {}
    if module.measures_output_gradient:
        weights = weights_at(module.objective.weights, moment)
        reported |= squared_output_gradients(terms, weights, reconstruction)
    if module.semantic is not None:
        states = quantized.quantized if moment.taught else quantized.quantized.detach()
        add_semantic(module, terms, reported, states, batch, counts)
    total = module.objective.total(terms, moment.stage.weights)
    generator_loss = total.detach()
    if module.shards is not None and "semantic" not in terms:
        total = total + nothing_from_lm(module, quantized.quantized, moment)
    if moment.judged or moment.discriminators_learn:
        judgement = judge(module, reconstruction, batch, counts, moment)
        total = total + judgement.surrogate
        generator_loss = generator_loss + judgement.weighted
        terms |= judgement.terms
        reported |= judgement.observed
        if judgement.loss is not None:
            reported["loss/discriminators"] = judgement.loss
    module.manual_backward(total)
    reported |= {f"loss/{name}": value for name, value in terms.items()} | {"loss/generator": generator_loss}
    return {name: value.detach() for name, value in reported.items()}


def keep_company(module: "CatModule", moment: StageMoment) -> None:
    """Pass all sharded networks, forward and backward, and add nothing: other ranks have one more micro-batch."""
    tokenizer = module.tokenizer
    silence = torch.zeros(1, tokenizer.config.number_channels, tokenizer.config.downsample_rate, device=module.device)
    quantized = tokenizer.quantizer(tokenizer.encode_latent(silence)).quantized
    nothing = 0.0 * tokenizer.decode_latent(quantized).sum()
    module.manual_backward(nothing + nothing_from_lm(module, quantized, moment))


def nothing_from_lm(module: "CatModule", quantized: Tensor, moment: StageMoment) -> Tensor:
    """Zero, by way of the text LM if there is one: in every micro-batch all ranks have to pass it or none.

    An LM that does not teach gets no gradient from its input, here as there: with one its own would come in another
    order than on ranks that have text.
    """
    if module.semantic is None:
        return torch.zeros((), device=quantized.device)
    states = quantized if moment.taught else quantized.detach()
    one = torch.ones(1, dtype=torch.int64, device=states.device)
    return 0.0 * module.semantic(states[:1, :1], one, 0 * one[None], one, 0 * one).loss_sum


def add_semantic(
    module: "CatModule",
    terms: dict[str, Tensor],
    reported: dict[str, Tensor],
    states: Tensor,
    batch: Batch,
    counts: UpdateCounts,
) -> None:
    """Cross entropy of the texts of those clips that have one, given the states [B, F, D] after the quantizer."""
    assert module.semantic is not None
    host = batch.host or batch
    with_text = (host.text_lengths > 0).nonzero()[:, 0]
    if len(with_text) == 0:
        return
    num_frames, text_lengths = module.tokenizer.num_frames(host.audio_lengths[with_text]), host.text_lengths[with_text]
    chosen = with_text.to(states.device, non_blocking=True)
    texts, tasks = batch.text_tokens[chosen], batch.task_ids[chosen]
    prediction = module.semantic(states[chosen], num_frames, texts, text_lengths, tasks)
    terms["semantic"] = prediction.loss_sum / counts.text_tokens.clamp(min=1)
    reported["text_accuracy"] = prediction.num_correct / counts.text_tokens.clamp(min=1)


def judge(
    module: "CatModule", reconstruction: Tensor, batch: Batch, counts: UpdateCounts, moment: StageMoment
) -> Judgement:
    """One forward of the discriminators serves both sides, and neither side's backward enters the other's graph.

    The discriminators see a detached copy of the reconstruction's crop. Their own loss goes back to their weights, the
    generator's terms to the copy, and that gradient continues from the crop in the generator's one backward.

    Cost in units of one forward of all discriminators, a backward of weights or of inputs counted as one each:
    2 forward, 4 for their own loss, 1 for the generator's terms = 7 (10 with a pass per loss); 6 in their head start;
    3 in an update in which they do not learn.
    """
    assert module.discriminators is not None
    objective = module.objective
    crop = objective.crop(reconstruction, batch)
    copy = crop.detach().requires_grad_(moment.judged)
    module.discriminators.requires_grad_(moment.discriminators_learn)
    with torch.set_grad_enabled(moment.discriminators_learn):
        real = module.discriminators(objective.crop(batch.audio, batch))
    generated = module.discriminators(copy)
    observed = mean_logits(real, generated, counts.clips)
    loss = None
    if moment.discriminators_learn:
        loss = objective.discriminator_term(real, generated, counts)
        module.manual_backward(loss, inputs=module.discriminator_parameters(), retain_graph=moment.judged)
    if not moment.judged:
        zero = torch.zeros((), device=crop.device)
        return Judgement({}, zero, zero, loss, observed)
    terms = objective.judge_terms(real, generated, counts)
    weighted = moment.ramp * objective.total(terms, moment.stage.weights)
    if module.measures_output_gradient:
        weights = weights_at(objective.weights, moment)
        observed |= squared_output_gradients(terms, weights, copy)
    with torch.autocast(crop.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(weighted, copy)
    return Judgement(terms, weighted.detach(), (crop * gradient).sum(), loss, observed)
