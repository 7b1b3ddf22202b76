"""Stages are data: what is trained, with which terms and rates, on how much audio, for how many updates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

PARTS = ("encoder", "quantizer", "decoder", "semantic")


@dataclass(frozen=True)
class Stage:
    """One stretch of the training.

    Attributes:
        name: for logs.
        updates: generator updates in this stage.
        batch_seconds: audio per update over all ranks, in seconds.
        adversarial: whether discriminators are trained and judge the generator.
        learning_rate, final_learning_rate: of the generator side, peak and end.
        discriminator_learning_rate: peak; it follows the same curve.
        warmup_updates: linear warm-up at the start of the stage.
        discriminator_warmup_updates: the discriminators' head start, in which they do not yet judge the generator.
        adversarial_ramp_updates: after it, over which the weights of the adversarial terms rise from 0.
        semantic_warmup_updates: the text LM's head start, in which it does not yet teach the tokenizer.
        discriminator_every: the discriminators learn in every n-th update; they judge the generator in all of them.
        schedule: after the warm-up a cosine to the final rate, or "wsd": the peak, then a decay at the end.
        decay_share: of the stage's updates, the length of that decay.
        train: parts that learn, of PARTS.
        weights: loss weights that differ in this stage.
        quantize: false trains with the continuous latent; the levels are fitted to data before the next stage.

    Raises:
        ValueError: a value that cannot work, by name.
    """

    name: str
    updates: int
    batch_seconds: float
    adversarial: bool = False
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    discriminator_learning_rate: float = 1e-4
    warmup_updates: int = 2000
    discriminator_warmup_updates: int = 0
    adversarial_ramp_updates: int = 0
    semantic_warmup_updates: int = 0
    discriminator_every: int = 1
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_share: float = 0.2
    train: Sequence[str] = PARTS
    weights: Mapping[str, float] = field(default_factory=dict)
    quantize: bool = True

    def __post_init__(self) -> None:
        positive = ("batch_seconds", "learning_rate", "discriminator_learning_rate")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"stage {self.name}: {name} must be above 0 and finite, got {getattr(self, name)}")
        starts = ("warmup_updates", "discriminator_warmup_updates", "semantic_warmup_updates")
        counts = ("updates", *starts, "adversarial_ramp_updates")
        for name, least in (*((name, 0) for name in counts), ("discriminator_every", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"stage {self.name}: {name} must be a whole number from {least}, got {value}")
        if not isinstance(self.quantize, bool):
            raise ValueError(f"stage {self.name}: quantize must be true or false, got {self.quantize!r}")
        if self.schedule not in ("cosine", "wsd"):
            raise ValueError(f"stage {self.name}: schedule must be cosine or wsd, got {self.schedule!r}")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"stage {self.name}: decay_share must be above 0 and at most 1, got {self.decay_share}")
        if unknown := set(self.train) - set(PARTS):
            raise ValueError(f"stage {self.name}: train={list(self.train)} has {sorted(unknown)}, not of {PARTS}")
        if not set(self.train) & {"encoder", "quantizer", "decoder"}:
            raise ValueError(f"stage {self.name}: train={list(self.train)} leaves nothing of the tokenizer to learn")

    def rate_factor(self, update: int) -> float:
        """Learning rate of an update of this stage (from 0) as a share of the peak.

        The decay of "wsd" (warm-up, stable, decay) is 1 - sqrt(progress), as arXiv 2405.18392 found best.
        """
        if update < self.warmup_updates:
            return (update + 1) / self.warmup_updates
        start = self.warmup_updates
        if self.schedule == "wsd":
            start = max(start, self.updates - round(self.decay_share * self.updates))
        progress = min(max(update - start, 0) / max(self.updates - start, 1), 1.0)
        left = 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1 - math.sqrt(progress)
        floor = self.final_learning_rate / self.learning_rate
        return floor + (1 - floor) * left


@dataclass(frozen=True)
class StageMoment:
    """A stage and how many of its updates have been done."""

    stage: Stage
    update: int

    @property
    def taught(self) -> bool:
        """Whether the text LM's gradient reaches the tokenizer."""
        return self.update >= self.stage.semantic_warmup_updates

    @property
    def judged(self) -> bool:
        """Whether the discriminators take part in the generator's loss."""
        return self.stage.adversarial and self.update >= self.stage.discriminator_warmup_updates

    @property
    def ramp(self) -> float:
        """Share of their weights that the adversarial terms have: a line from the end of the head start up to 1."""
        done = self.update - self.stage.discriminator_warmup_updates + 1
        return min(1.0, max(done, 0) / max(self.stage.adversarial_ramp_updates, 1))

    @property
    def discriminators_learn(self) -> bool:
        """Whether it is the discriminators' turn: every n-th update, the first of the stage included."""
        return self.stage.adversarial and self.update % self.stage.discriminator_every == 0


@dataclass(frozen=True)
class Schedule:
    """The stages of a run in order, addressed by the one clock: the number of generator updates done."""

    stages: tuple[Stage, ...]

    @classmethod
    def from_config(cls, stages: Sequence[Mapping[str, Any]]) -> "Schedule":
        """Build from plain mappings; ValueError for an empty list, TypeError for an unknown key."""
        if not stages:
            raise ValueError("stages is empty: a run needs at least one")
        return cls(tuple(Stage(**stage) for stage in stages))

    @property
    def updates(self) -> int:
        """Updates of all stages together."""
        return sum(stage.updates for stage in self.stages)

    @property
    def ends(self) -> tuple[int, ...]:
        """Updates done when each stage is over."""
        return tuple(accumulate(stage.updates for stage in self.stages))

    @property
    def adversarial(self) -> bool:
        """Whether any stage needs discriminators."""
        return any(stage.adversarial for stage in self.stages)

    def at(self, update: int) -> StageMoment:
        """The stage in which update number `update` (from 0) happens; the end of the run belongs to the last one."""
        for stage in self.stages[:-1]:
            if update < stage.updates:
                return StageMoment(stage, update)
            update -= stage.updates
        return StageMoment(self.stages[-1], update)
