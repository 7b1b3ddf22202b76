"""The LightningModule of the joint training: tokenizer, text LM and discriminators, optimised together.

One clock, `update`, counts generator updates. Lightning's `global_step` counts the steps of both optimizers and is not
used. Everything random about a batch was drawn with it, so a step depends on weights, optimizers and batch alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from moss_train.discriminators import DiscriminatorSet
from moss_train.export.loading import tokenizer_config
from moss_train.model import MossAudioTokenizerModel
from moss_train.training.objective import Objective, UpdateCounts
from moss_train.training.optimizers import (
    build_adamw,
    gradient_norm,
    scale_gradients,
    set_learning_rate,
)
from moss_train.training.stages import Schedule, StageMoment
from moss_train.types import Batch, UpdateBatch
from moss_train.utils.build import build

Node = Mapping[str, Any]


class CatModule(lightning.LightningModule):
    """Encoder, quantizer, decoder and text LM on the generator side, discriminators on the other.

    All arguments are plain data, stored in checkpoints: `CatModule.load_from_checkpoint(file)` needs nothing else.

    Args:
        tokenizer: released configuration keys, or the arguments of `MossAudioTokenizerConfig.from_stages`.
        stages: see `Stage`.
        semantic: node of the text LM, null for training without text.
        discriminators: nodes of the sub-discriminators; needed when a stage is adversarial.
        objective: `weights` and `crop_seconds` of `Objective`.
        optimizers: `OptimizerSettings` of `generator` and `discriminators`.
        seed: of the initial weights.
        max_skipped_updates: non-finite updates in a row before the run stops.
    """

    def __init__(
        self,
        tokenizer: Node,
        stages: Sequence[Node],
        semantic: Node | None = None,
        discriminators: Sequence[Node] = (),
        objective: Node | None = None,
        optimizers: Mapping[str, Node] | None = None,
        seed: int = 0,
        max_skipped_updates: int = 3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer_settings = dict(optimizers or {})
        self.max_skipped_updates = max_skipped_updates
        self.automatic_optimization = False
        self.schedule = Schedule.from_config(stages)
        if self.schedule.adversarial and not discriminators:
            raise ValueError("a stage is adversarial, but there are no discriminators")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokenizer = MossAudioTokenizerModel(tokenizer_config(tokenizer))
            latent_dim = self.tokenizer.config.quantizer_kwargs["output_dim"]
            self.semantic = build(semantic, path="semantic", latent_dim=latent_dim) if semantic else None
            judges = [build(node, path=f"discriminators[{i}]") for i, node in enumerate(discriminators)]
            self.discriminators = DiscriminatorSet(judges) if judges else None
        self.objective = Objective(self.tokenizer.sampling_rate, **(objective or {}))
        self.update = 0
        self.position = 0
        self.skipped_in_a_row = 0
        self.metrics: dict[str, float] = {}

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """`MossAudioTokenizerModel.encode`."""
        return self.tokenizer.encode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """`MossAudioTokenizerModel.decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        settings = self.optimizer_settings
        generator = [self.tokenizer] if self.semantic is None else [self.tokenizer, self.semantic]
        optimizers: list[torch.optim.Optimizer] = [build_adamw(generator, settings.get("generator", {}))]
        if self.discriminators is not None:
            defaults = {"betas": (0.8, 0.99), "weight_decay": 0.0}
            optimizers.append(build_adamw([self.discriminators], {**defaults, **settings.get("discriminators", {})}))
        return optimizers

    def transfer_batch_to_device(self, batch: UpdateBatch, device: torch.device, dataloader_idx: int) -> UpdateBatch:
        return batch.to(device)

    def training_step(self, batch: UpdateBatch, batch_idx: int) -> None:
        """One update: gradients of every micro-batch for both sides, then one step of each optimizer."""
        moment = self.schedule.at(self.update)
        self.metrics = {}
        if batch.micro_batches:
            self._choose_parts(moment)
            counts = self.objective.count(batch.micro_batches)
            terms: dict[str, Tensor] = {}
            for micro_batch in batch.micro_batches:
                for name, value in self._accumulate(micro_batch, counts, moment).items():
                    terms[name] = terms.get(name, 0) + value
            self._step(terms, moment, batch)
        self.update += 1
        self.position = batch.next_position

    def generator_parameters(self) -> list[nn.Parameter]:
        """Parameters of the generator side that learn in the current stage."""
        modules = [self.tokenizer] if self.semantic is None else [self.tokenizer, self.semantic]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def discriminator_parameters(self) -> list[nn.Parameter]:
        """Parameters of all sub-discriminators."""
        return [] if self.discriminators is None else list(self.discriminators.parameters())

    def _choose_parts(self, moment: StageMoment) -> None:
        for name in ("encoder", "quantizer", "decoder"):
            getattr(self.tokenizer, name).requires_grad_(name in moment.stage.train)
        if self.semantic is not None:
            self.semantic.requires_grad_("semantic" in moment.stage.train)

    def _accumulate(self, batch: Batch, counts: UpdateCounts, moment: StageMoment) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; returns its share of every term, detached."""
        levels = self.num_quantizers(batch)
        latent = self.tokenizer.encode_latent(batch.audio)
        quantized = self.tokenizer.quantizer(latent, levels)
        reconstruction = self.tokenizer.decode_latent(quantized.quantized)
        num_frames = self.tokenizer.num_frames(batch.audio_lengths)
        frame_mask = torch.arange(latent.shape[1], device=latent.device) < num_frames[:, None]
        terms = self.objective.codec_terms(batch, reconstruction, quantized, frame_mask, counts)
        reported: dict[str, Tensor] = {}
        if self.semantic is not None:
            self._add_semantic(terms, reported, quantized.quantized, num_frames, batch, counts)
        if moment.stage.adversarial:
            self._add_judgement(terms, reported, reconstruction, batch, counts, moment)
        total = self.objective.total(terms, moment.stage.weights)
        self.manual_backward(total, inputs=self.generator_parameters())
        reported |= {f"loss/{name}": value for name, value in terms.items()} | {"loss/generator": total}
        return {name: value.detach() for name, value in reported.items()}

    def num_quantizers(self, batch: Batch) -> Tensor:
        """Quantizer dropout: how many levels each clip uses, uniform over 1 ... N: [B] int64."""
        return 1 + (batch.quantizer_units.double() * self.tokenizer.config.num_quantizers).long()

    def _add_semantic(
        self,
        terms: dict[str, Tensor],
        reported: dict[str, Tensor],
        states: Tensor,
        num_frames: Tensor,
        batch: Batch,
        counts: UpdateCounts,
    ) -> None:
        assert self.semantic is not None
        with_text = (batch.text_lengths > 0).nonzero()[:, 0]
        if len(with_text) == 0:
            return
        tensors = (states, num_frames, batch.text_tokens, batch.text_lengths, batch.task_ids)
        prediction = self.semantic(*(tensor[with_text] for tensor in tensors))
        terms["semantic"] = prediction.loss_sum / counts.text_tokens.clamp(min=1)
        reported["text_accuracy"] = prediction.num_correct / counts.text_tokens.clamp(min=1)

    def _add_judgement(
        self,
        terms: dict[str, Tensor],
        reported: dict[str, Tensor],
        reconstruction: Tensor,
        batch: Batch,
        counts: UpdateCounts,
        moment: StageMoment,
    ) -> None:
        """One forward of the discriminators serves both sides: each takes the gradient of its own inputs."""
        assert self.discriminators is not None
        real = self.discriminators(self.objective.crop(batch.audio, batch))
        generated = self.discriminators(self.objective.crop(reconstruction, batch))
        loss = self.objective.discriminator_term(real, generated, counts)
        self.manual_backward(loss, inputs=self.discriminator_parameters(), retain_graph=True)
        reported["loss/discriminators"] = loss
        if moment.judged:
            terms |= self.objective.judge_terms(real, generated, counts)

    def _step(self, terms: dict[str, Tensor], moment: StageMoment, batch: UpdateBatch) -> None:
        """Clip and step both optimizers, or skip the update when anything is not finite."""
        sides = [("generator", moment.stage.learning_rate, self.generator_parameters())]
        if moment.stage.adversarial:
            sides.append(("discriminators", moment.stage.discriminator_learning_rate, self.discriminator_parameters()))
        norms = {name: gradient_norm(parameters) for name, _, parameters in sides}
        values = terms | {f"gradient_norm/{name}": norm.to(self.device) for name, norm in norms.items()}
        # The one host synchronisation of an update.
        numbers = torch.stack([value.double().reshape(()) for value in values.values()]).tolist()
        self.metrics = dict(zip(values, numbers, strict=True))
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        is_finite = all(torch.isfinite(torch.tensor(numbers, dtype=torch.float64)).tolist())
        factor = moment.stage.rate_factor(moment.update)
        for (name, peak, parameters), optimizer in zip(sides, optimizers, strict=False):
            self.metrics[f"learning_rate/{name}"] = peak * factor
            if is_finite:
                settings = self.optimizer_settings.get(name, {})
                scale_gradients(parameters, norms[name], settings.get("clip_norm", 1.0))
                set_learning_rate(optimizer.optimizer, peak * factor)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._note_skip(is_finite, batch)

    def _note_skip(self, is_finite: bool, batch: UpdateBatch) -> None:
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        if is_finite:
            return
        ids = [name for micro_batch in batch.micro_batches for name in micro_batch.sample_ids]
        bad = [name for name, value in self.metrics.items() if not torch.isfinite(torch.tensor(value))]
        message = f"update {self.update} skipped: {', '.join(bad)} not finite; samples {', '.join(ids[:8])}"
        self.trainer.strategy.barrier()
        if self.skipped_in_a_row >= self.max_skipped_updates:
            raise FloatingPointError(f"{message}; {self.skipped_in_a_row} in a row, stopping. Try a lower rate.")
        lightning.pytorch.utilities.rank_zero_warn(message)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store our clock and the stream's position; Lightning's loop counters belong to one process only."""
        checkpoint.pop("loops", None)
        checkpoint["global_step"] = self.update
        checkpoint["progress"] = {"update": self.update, "position": self.position}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint["progress"]
        self.update, self.position = progress["update"], progress["position"]


def cat_module(module: lightning.LightningModule) -> CatModule:
    """The module that Lightning hands to callbacks, as what it is."""
    assert isinstance(module, CatModule)
    return module
