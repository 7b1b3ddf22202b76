"""The LightningModule of the joint training: tokenizer, text LM and discriminators, optimised together.

The only clock is `update`, which counts generator updates. Lightning's `global_step` counts the steps of both
optimizers and is not used. The data stream draws all random numbers of a batch, so a step depends only on weights,
optimizer states and the batch.

The update itself is in `step/update.py`. Callbacks get its result as `outputs` of `on_train_batch_end` (see
`update_result`). A callback that needs its own numbers summed over the ranks adds a function to `counters`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from moss_train.batch import UpdateBatch
from moss_train.config.build import build
from moss_train.config.old_names import rename_keys
from moss_train.config.recipe_schema import ObjectiveConfig, OptimizersConfig
from moss_train.discriminators import DiscriminatorSet
from moss_train.export.load import tokenizer_config
from moss_train.model import MossAudioTokenizerModel
from moss_train.model.transformer import ProjectedTransformer
from moss_train.training.distributed.collectives import check_equal_start, gather_over_ranks
from moss_train.training.distributed.fsdp import FSDPUnits
from moss_train.training.step.objective import Objective
from moss_train.training.step.optimizers import CHECKPOINT_KEY, EMA, build_adamw, group_options, restore_options
from moss_train.training.step.schedule import Schedule, ScheduleState
from moss_train.training.step.update import Networks, OptimizerGroup, UpdateResult, run_update
from moss_train.utils.errors import UserError

Node = Mapping[str, Any]
RESULT = "result"  # key of the UpdateResult in the outputs that Lightning passes to callbacks
BALANCE_KEY = "gradient_balance"


class NonFiniteError(FloatingPointError):
    """Too many consecutive updates were not finite; `batch` and `result` are those of the last one."""

    def __init__(self, message: str, batch: UpdateBatch, result: UpdateResult) -> None:
        super().__init__(message)
        self.batch = batch
        self.result = result


class CatModule(lightning.LightningModule):
    """Encoder, quantizer, decoder and text LM on the generator side, discriminators on the other.

    All arguments are plain data, stored in checkpoints: `CatModule.load_from_checkpoint(file)` needs nothing else.

    Args:
        tokenizer: keys of a released configuration, or the arguments of `MossAudioTokenizerConfig.from_stages`.
        stages: fields of each `Stage`, in order.
        semantic: configuration node of the text LM; None trains without text.
        discriminators: configuration nodes of the sub-discriminators; required when a stage is adversarial.
        objective: arguments of `Objective`, without the sampling rate.
        optimizers: fields of `OptimizerConfig`, under `generator` and `discriminators`.
        seed: seed for the initial weights.
        max_skipped_updates: number of consecutive non-finite updates at which the run stops.
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
        self.optimizer_settings = OptimizersConfig.parse(optimizers or {}, "optimizers")
        self.max_skipped_updates = max_skipped_updates
        self.automatic_optimization = False
        self.schedule = Schedule.from_config(stages)
        if self.schedule.adversarial and not discriminators:
            raise ValueError("a stage is adversarial, but there are no discriminators")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = tokenizer_config(tokenizer)
            config.compute_dtype = None  # meant for inference; the trainer sets the precision of training
            self.tokenizer = MossAudioTokenizerModel(config)
            latent_dim = self.tokenizer.config.quantizer_kwargs["output_dim"]
            self.semantic = build(semantic, path="semantic", latent_dim=latent_dim) if semantic else None
            built = [build(node, path=f"discriminators[{i}]") for i, node in enumerate(discriminators)]
            self.discriminators = DiscriminatorSet(built) if built else None
        self.objective = Objective(self.tokenizer.output_sampling_rate, **rename_keys(ObjectiveConfig, objective or {}))
        for stage in self.schedule.stages:
            self.objective.stage_weights(stage)  # raises for unknown terms
        if self.schedule.adversarial and not self.objective.trains_discriminators:
            raise ValueError(
                "a stage is adversarial, but objective.losses has none that trains the discriminators, as "
                "LeastSquaresLoss does"
            )
        self.update = 0
        self.position = 0
        self.consecutive_skipped = 0
        self.reduce_dtype: torch.dtype | None = None
        self.shards: FSDPUnits | None = None
        self.average: EMA | None = None
        self.shares_every_updates: int | None = None
        self.counters: list[Callable[[UpdateBatch], Mapping[str, float]]] = []
        self.gather_dtype: torch.dtype | None = None

    def configure_model(self) -> None:
        """Shard the networks over the ranks under `FSDP2Strategy`, once they have their initial weights."""
        if self.device_mesh is None or self.shards is not None:
            return
        check_equal_start(self, (self.update, self.position))
        networks = [*stages_of(self.tokenizer), *([] if self.semantic is None else [self.semantic])]
        self.shards = FSDPUnits(networks, self.device_mesh["data_parallel"], self.reduce_dtype, self.gather_dtype)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        settings = self.optimizer_settings
        optimizers: list[torch.optim.Optimizer] = [build_adamw(self.parts(), settings.generator)]
        if self.discriminators is not None:
            optimizers.append(build_adamw({"discriminators": self.discriminators}, settings.discriminators))
        self._group_options = [group_options(optimizer) for optimizer in optimizers]
        return optimizers

    def training_step(self, batch: UpdateBatch, batch_idx: int) -> dict[str, UpdateResult]:
        """Do one update: accumulate both sides' gradients over all micro-batches, then step each optimizer once."""
        schedule_state = self.schedule.at(self.update)
        self._choose_parts(schedule_state)
        try:
            result = run_update(
                self.networks,
                self.objective,
                self.optimizer_groups(schedule_state),
                self.manual_backward,
                batch,
                schedule_state,
                lambda batch: {name: value for counter in self.counters for name, value in counter(batch).items()},
                self.reduce_dtype,
                self.shares_every_updates is not None and (self.update + 1) % self.shares_every_updates == 0,
            )
        except torch.OutOfMemoryError as error:
            largest = max((micro_batch.audio for micro_batch in batch.micro_batches), key=lambda audio: audio.numel())
            clips, seconds = largest.shape[0], largest.shape[2] / self.tokenizer.sampling_rate
            raise UserError(
                f"out of memory on {self.device} in update {self.update}, whose largest micro-batch is {clips} clips "
                f"of {seconds:.1f} s: use trainer.precision=bf16-mixed, trainer.activation_checkpointing, "
                "trainer.strategy=fsdp or a lower data.micro_batch_seconds (with allow_config_changes=true); it "
                "continues from the newest checkpoint"
            ) from error
        self._count_skipped(result, batch)
        if self.objective.balancer is not None and not result.not_finite:
            self.objective.balancer.add(result.output_norms)
        if self.average is not None:
            self.average.add(self.update)
        self.update += 1
        self.position = batch.next_position
        return {RESULT: result}

    @property
    def networks(self) -> Networks:
        """Networks that an update trains."""
        return Networks(self.tokenizer, self.semantic, self.discriminators, is_sharded=self.shards is not None)

    def optimizer_groups(self, schedule_state: ScheduleState) -> list[OptimizerGroup]:
        """Return the optimizers that step in an update: the generator's, with the parts that the stage trains, and the
        discriminators' when it is their turn.
        """
        optimizers: Any = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        stage, settings = schedule_state.stage, self.optimizer_settings
        factor = stage.rate_factor(schedule_state.update)
        parts = {name: list(part.parameters()) for name, part in self.parts().items() if name in stage.parts}
        groups = [
            OptimizerGroup(
                "generator", optimizers[0], stage.learning_rate * factor, settings.generator.clip_norm, parts
            )
        ]
        if schedule_state.discriminators_learn and self.discriminators is not None:
            rate, clip_norm = stage.discriminator_learning_rate * factor, settings.discriminators.clip_norm
            parts = {"discriminators": list(self.discriminators.parameters())}
            groups.append(OptimizerGroup("discriminators", optimizers[1], rate, clip_norm, parts))
        return groups

    def _count_skipped(self, result: UpdateResult, batch: UpdateBatch) -> None:
        """Count consecutive skipped updates, warn with their sample ids, and raise NonFiniteError after too many."""
        if not result.not_finite:
            self.consecutive_skipped = 0
            return
        self.consecutive_skipped += 1
        own = [name for micro_batch in batch.micro_batches for name in micro_batch.sample_ids]
        ids = [name for names in gather_over_ranks(own) for name in names]
        bad = ", ".join(result.not_finite)
        message = f"update {self.update} skipped: {bad} not finite; samples {', '.join(ids[:8])}"
        if self.consecutive_skipped >= self.max_skipped_updates:
            message += f"; {self.consecutive_skipped} in a row, stopping. Try a lower rate."
            raise NonFiniteError(message, batch, result)
        rank_zero_warn(message)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run Lightning's backward without autocast: operations that ran forward in float32 run backward in float32."""
        with torch.autocast(loss.device.type, enabled=False):
            super().manual_backward(loss, *args, **kwargs)

    def parts(self) -> dict[str, nn.Module]:
        """Return the generator's parts that a stage can train, by name (see `PARTS`)."""
        parts = {name: getattr(self.tokenizer, name) for name in ("encoder", "quantizer", "decoder")}
        return parts if self.semantic is None else parts | {"semantic": self.semantic}

    def _choose_parts(self, schedule_state: ScheduleState) -> None:
        for name, part in self.parts().items():
            part.requires_grad_(name in schedule_state.stage.parts)
        if self.discriminators is not None:  # before the hooks that sum their gradients are registered
            self.discriminators.requires_grad_(schedule_state.discriminators_learn)

    def on_fit_start(self) -> None:
        check_equal_start(self, (self.update, self.position))

    def on_train_start(self) -> None:
        """Apply the configured optimizer options over those of a restored checkpoint; start or continue the EMA."""
        for optimizer, options in zip(self.trainer.optimizers, self._group_options, strict=True):
            restore_options(optimizer, options)
        if self.average is not None:
            self.average.start(self.tokenizer)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Swap the EMA weights, if any, into the tokenizer inside the `with` block, for validation and samples.

        Sharded networks are unsharded inside the block.
        """
        average = nullcontext() if self.average is None else self.average.swapped_in()
        with average, nullcontext() if self.shards is None else self.shards.unsharded():
            yield

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the update, the stream position, the EMA and the gradient balancer.

        Lightning's loop counters, which are valid in one process only, are dropped.
        """
        checkpoint.pop("loops", None)
        checkpoint["global_step"] = self.update
        checkpoint["progress"] = {"update": self.update, "position": self.position}
        if self.average is not None:
            checkpoint[CHECKPOINT_KEY] = self.average.state_dict()
        if self.objective.balancer is not None:
            checkpoint[BALANCE_KEY] = self.objective.balancer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint["progress"]
        self.update, self.position = progress["update"], progress["position"]
        if self.average is not None and CHECKPOINT_KEY in checkpoint:
            self.average.load_state_dict(checkpoint[CHECKPOINT_KEY])
        if self.objective.balancer is not None and BALANCE_KEY in checkpoint:
            self.objective.balancer.load_state_dict(checkpoint[BALANCE_KEY])


def stages_of(model: MossAudioTokenizerModel) -> list[ProjectedTransformer]:
    """Return all transformer stages of the encoder and the decoder."""
    return [stage for stage in (*model.encoder, *model.decoder) if isinstance(stage, ProjectedTransformer)]


def update_result(outputs: Any) -> UpdateResult:
    """Return the result of an update from the `outputs` that Lightning passes to `on_train_batch_end`."""
    result = outputs[RESULT]
    assert isinstance(result, UpdateResult)
    return result


def cat_module(module: lightning.LightningModule) -> CatModule:
    """Return the module that Lightning passes to callbacks, typed as the `CatModule` that it is."""
    assert isinstance(module, CatModule)
    return module
