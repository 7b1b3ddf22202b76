"""The LightningModule of the joint training: tokenizer, text LM and discriminators, optimised together.

One clock, `update`, counts generator updates. Lightning's `global_step` counts the steps of both optimizers and is not
used. Everything random about a batch was drawn with it, so a step depends on weights, optimizers and batch alone.

Numbers of an update are the same on every rank and cost one synchronisation: `metrics` are those of the update itself.
What callbacks put into `contributions` before an update (the same names on every rank) is in `sums` after it, summed
over the ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from moss_train.batch import Batch, UpdateBatch
from moss_train.config.build import build
from moss_train.discriminators import DiscriminatorSet
from moss_train.export.load import tokenizer_config
from moss_train.model import MossAudioTokenizerModel
from moss_train.model.transformer import ProjectedTransformer
from moss_train.training.distributed.collectives import check_equal_start
from moss_train.training.distributed.fsdp import Shards
from moss_train.training.step.diagnostics import CodeCounts
from moss_train.training.step.ema import CHECKPOINT_KEY, WeightAverage
from moss_train.training.step.objective import Objective
from moss_train.training.step.optimizers import build_adamw, group_options
from moss_train.training.step.schedule import Schedule, StageMoment
from moss_train.training.updates import do_update
from moss_train.utils.errors import UserError

Node = Mapping[str, Any]


class CatModule(lightning.LightningModule):
    """Encoder, quantizer, decoder and text LM on the generator side, discriminators on the other.

    All arguments are plain data, stored in checkpoints: `CatModule.load_from_checkpoint(file)` needs nothing else.

    Args:
        tokenizer: released configuration keys, or the arguments of `MossAudioTokenizerConfig.from_stages`.
        stages: see `Stage`.
        semantic: node of the text LM, null for training without text.
        discriminators: nodes of the sub-discriminators; needed when a stage is adversarial.
        objective: arguments of `Objective` beside the sampling rate.
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
        self.reduce_dtype: torch.dtype | None = None
        self.shards: Shards | None = None
        self.average: WeightAverage | None = None
        self.metrics: dict[str, float] = {}
        self.contributions: dict[str, float] = {}
        self.sums: dict[str, float] = {}
        quantizer = self.tokenizer.config.quantizer_kwargs
        self.code_counts = CodeCounts(quantizer["num_quantizers"], quantizer["codebook_size"])
        self.measures_output_gradient = False

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """`MossAudioTokenizerModel.encode`."""
        return self.tokenizer.encode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """`MossAudioTokenizerModel.decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def configure_model(self) -> None:
        """Under `ShardedStrategy`, once the weights are those of the start: divide them among the ranks."""
        if self.device_mesh is None or self.shards is not None:
            return
        check_equal_start(self, (self.update, self.position))
        networks = [*stages_of(self.tokenizer), *([] if self.semantic is None else [self.semantic])]
        self.shards = Shards(networks, self.device_mesh["data_parallel"], self.reduce_dtype)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        settings = self.optimizer_settings
        optimizers: list[torch.optim.Optimizer] = [build_adamw(self.parts(), settings.get("generator", {}))]
        if self.discriminators is not None:
            judges = {"discriminators": self.discriminators}
            defaults = {"betas": (0.8, 0.99), "weight_decay": 0.0}
            optimizers.append(build_adamw(judges, {**defaults, **settings.get("discriminators", {})}))
        self._group_options = [group_options(optimizer) for optimizer in optimizers]
        return optimizers

    def transfer_batch_to_device(self, batch: UpdateBatch, device: torch.device, dataloader_idx: int) -> UpdateBatch:
        return batch.to(device)

    def training_step(self, batch: UpdateBatch, batch_idx: int) -> None:
        """One update: gradients of every micro-batch for both sides, then one step of each optimizer."""
        moment = self.schedule.at(self.update)
        self._choose_parts(moment)
        try:
            do_update(self, batch, moment)
        except torch.OutOfMemoryError as error:
            raise UserError(out_of_memory(self, batch)) from error
        if self.average is not None:
            self.average.add(self.update)
        self.update += 1
        self.position = batch.next_position

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's, outside its autocast: what went forward in float32 comes back in float32."""
        with torch.autocast(loss.device.type, enabled=False):
            super().manual_backward(loss, *args, **kwargs)

    def parts(self) -> dict[str, nn.Module]:
        """What a stage can train on the generator side, by name (see `PARTS`)."""
        parts = {name: getattr(self.tokenizer, name) for name in ("encoder", "quantizer", "decoder")}
        return parts if self.semantic is None else parts | {"semantic": self.semantic}

    def discriminator_parameters(self) -> list[nn.Parameter]:
        """Parameters of all sub-discriminators."""
        return [] if self.discriminators is None else list(self.discriminators.parameters())

    def _choose_parts(self, moment: StageMoment) -> None:
        for name, part in self.parts().items():
            part.requires_grad_(name in moment.stage.train)

    def num_quantizers(self, batch: Batch) -> Tensor:
        """Quantizer dropout: how many levels each clip uses, [B] int64 (see `Objective`)."""
        return self.objective.num_quantizers(batch, self.tokenizer.config.num_quantizers)

    def on_fit_start(self) -> None:
        check_equal_start(self, (self.update, self.position))

    def on_train_start(self) -> None:
        """With everything restored: settings that were changed since the checkpoint hold, the average goes on."""
        for optimizer, options in zip(self.trainer.optimizers, self._group_options, strict=True):
            for group, option in zip(optimizer.param_groups, options, strict=True):
                group.update(option)
        if self.average is not None:
            self.average.start(self.tokenizer)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it the tokenizer has its averaged weights, without `ema` its own: for validation and samples.

        Sharded networks are whole.
        """
        average = nullcontext() if self.average is None else self.average.swapped_in()
        with average, nullcontext() if self.shards is None else self.shards.whole():
            yield

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store our clock and the stream's position; Lightning's loop counters belong to one process only."""
        checkpoint.pop("loops", None)
        checkpoint["global_step"] = self.update
        checkpoint["progress"] = {"update": self.update, "position": self.position}
        if self.average is not None:
            checkpoint[CHECKPOINT_KEY] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint["progress"]
        self.update, self.position = progress["update"], progress["position"]
        if self.average is not None and CHECKPOINT_KEY in checkpoint:
            self.average.load_state_dict(checkpoint[CHECKPOINT_KEY])


def out_of_memory(module: CatModule, batch: UpdateBatch) -> str:
    """What a device could not hold, and what to do about it."""
    largest = max((micro_batch.audio for micro_batch in batch.micro_batches), key=lambda audio: audio.numel())
    clips, seconds = largest.shape[0], largest.shape[2] / module.tokenizer.sampling_rate
    return (
        f"out of memory on {module.device} in update {module.update}, whose largest micro-batch is {clips} clips of "
        f"{seconds:.1f} s: use trainer.precision=bf16-mixed, trainer.activation_checkpointing, trainer.strategy=fsdp "
        "or a lower data.micro_batch_seconds (with allow_changes=true); it goes on from the newest checkpoint"
    )


def stages_of(model: MossAudioTokenizerModel) -> list[ProjectedTransformer]:
    """All transformer stages, of the encoder and the decoder."""
    return [stage for stage in (*model.encoder, *model.decoder) if isinstance(stage, ProjectedTransformer)]


def cat_module(module: lightning.LightningModule) -> CatModule:
    """The module that Lightning hands to callbacks, as what it is."""
    assert isinstance(module, CatModule)
    return module
