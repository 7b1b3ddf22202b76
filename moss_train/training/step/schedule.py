"""Training stages and learning rate schedule: what is trained, with which terms and rates, for how many updates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from moss_train.config.recipe_schema import StageConfig
from moss_train.utils.errors import ConfigError

PARTS = ("encoder", "quantizer", "decoder", "semantic")


class Stage(StageConfig):
    """One stage of the training; see `StageConfig` for its fields.

    Raises:
        ConfigError: a value is invalid; the error names its key.
    """

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that are trained."""
        return tuple(PARTS if self.trainable is None else self.trainable)

    def rate_factor(self, update: int) -> float:
        """Return the learning rate of update number `update` of this stage (from 0) as a fraction of the peak.

        The decay of "wsd" (warm-up, stable, decay) is 1 - sqrt(progress), as arXiv 2405.18392 found best.
        """
        if update < self.warmup_updates:
            return (update + 1) / self.warmup_updates
        start = self.warmup_updates
        if self.schedule == "wsd":
            start = max(start, self.updates - round(self.decay_fraction * self.updates))
        progress = min(max(update - start, 0) / max(self.updates - start, 1), 1.0)
        remaining = 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1 - math.sqrt(progress)
        floor = self.final_learning_rate / self.learning_rate
        return floor + (1 - floor) * remaining


@dataclass(frozen=True)
class ScheduleState:
    """A stage and how many of its updates have been done."""

    stage: Stage
    update: int

    @property
    def text_lm_trains_tokenizer(self) -> bool:
        """Whether the text LM's gradient reaches the tokenizer."""
        return self.update >= self.stage.semantic_warmup_updates

    @property
    def adversarial_loss_active(self) -> bool:
        """Whether the discriminators take part in the generator's loss."""
        return self.stage.adversarial and self.update >= self.stage.discriminator_warmup_updates

    @property
    def adversarial_ramp(self) -> float:
        """Factor on the weights of the adversarial terms, which rises linearly to 1 after the warm-up."""
        done = self.update - self.stage.discriminator_warmup_updates + 1
        return min(1.0, max(done, 0) / max(self.stage.adversarial_ramp_updates, 1))

    @property
    def discriminators_learn(self) -> bool:
        """Whether this update trains the discriminators: every n-th update, starting with the stage's first."""
        return self.stage.adversarial and self.update % self.stage.discriminator_every == 0


@dataclass(frozen=True)
class Schedule:
    """The stages of a run in order, addressed by the number of generator updates done."""

    stages: tuple[Stage, ...]

    @classmethod
    def from_config(cls, stages: Sequence[Mapping[str, Any]]) -> "Schedule":
        """Build from plain mappings. Raises ConfigError for an empty list, an unknown key or a wrong value."""
        if not stages:
            raise ConfigError("required", "stages", None, "a run needs one or more")
        return cls(tuple(Stage.parse(stage, f"stages.{number}") for number, stage in enumerate(stages)))

    @property
    def updates(self) -> int:
        """Updates of all stages together."""
        return sum(stage.updates for stage in self.stages)

    @property
    def ends(self) -> tuple[int, ...]:
        """Number of updates done at the end of each stage, counted from the start of the run."""
        return tuple(accumulate(stage.updates for stage in self.stages))

    @property
    def quantizer_fits(self) -> frozenset[int]:
        """Numbers of updates done at which a stage without the quantizer ends and the levels are fitted to data."""
        used = [(stage, end) for stage, end in zip(self.stages, self.ends, strict=True) if stage.updates]
        return frozenset(end for (before, end), (after, _) in pairwise(used) if after.quantize and not before.quantize)

    @property
    def adversarial(self) -> bool:
        """Whether any stage needs discriminators."""
        return any(stage.adversarial for stage in self.stages)

    @property
    def long_warmups(self) -> dict[str, Stage]:
        """Stages, by their config path, whose warm-up takes a third of their updates or more.

        The default of 2,000 updates is meant for long stages; in a short one the rate may never reach its peak.
        """
        return {
            f"stages.{number}": stage
            for number, stage in enumerate(self.stages)
            if stage.updates and 3 * stage.warmup_updates >= stage.updates
        }

    def at(self, update: int) -> ScheduleState:
        """Return the stage of update number `update` (from 0); the end of the run belongs to the last stage."""
        for stage in self.stages[:-1]:
            if update < stage.updates:
                return ScheduleState(stage, update)
            update -= stage.updates
        return ScheduleState(self.stages[-1], update)
