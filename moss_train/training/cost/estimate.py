"""Estimate memory, time and cost of a run before it starts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moss_train.config.fit_schema import EstimateConfig
from moss_train.model import MossAudioTokenizerConfig
from moss_train.training.cost.flops import Cost, semantic_cost, stage_costs
from moss_train.training.cost.hardware import GPUS, StateSize, is_half
from moss_train.training.step.objective import Objective
from moss_train.training.step.schedule import Schedule, Stage
from moss_train.utils.errors import UserError
from moss_train.utils.files import read_json

FAR = 10.0  # an extrapolation beyond this multiple of the largest measured compute counts as far
GB = 1e9
UPDATE_BYTES = 50  # GPU memory traffic per parameter: copy for the sum 8, norm 4, AdamW and clipping 32, cast 6
BACKWARD_SHARE = 2 / 3  # of a forward and backward pass: two products for each one of the forward pass
BUCKET_BYTES = 64 * 2**20  # gradients that are summed together; no pass is left to overlap with the last bucket


@dataclass(frozen=True)
class ScalingLaw:
    """The law mel distance = coefficient * FLOP^exponent, on held-out clips decoded with all levels.

    Attributes:
        r_squared: how well it fits the measured runs.
        least, most: smallest and largest compute of the measured runs in FLOP.
        sizes: number of measured runs.
        origin: experiment and device, for display.
    """

    coefficient: float
    exponent: float
    r_squared: float
    least: float
    most: float
    sizes: int
    origin: str

    def distance(self, flops: float) -> float:
        """Return the mel distance that is predicted after this much compute in FLOP."""
        return self.coefficient * flops**self.exponent

    def describe_range(self, flops: float) -> str:
        """Return how far a prediction at this compute is from the measured range, in words."""
        if self.exponent >= 0:
            return "predicts nothing: the measured distance does not fall with compute"
        if flops <= self.most:
            return "inside the measured range" if flops >= self.least else "below the measured range"
        factor = flops / self.most
        text = f"{factor:,.3g} times the largest measured compute"
        return f"{text}: a far extrapolation, hardly more than a guess" if factor > FAR else text


def read_scaling_law(path: str | Path) -> ScalingLaw:
    """Read a file written by tools/scaling.py. Raises UserError when it is missing or not such a file."""
    try:
        record: Mapping[str, Any] = read_json(Path(path))
        flops = [float(point["flops"]) for point in record["points"]]
        law = {key: float(record["law"][key]) for key in ("coefficient", "exponent", "r_squared")}
        origin = f"{record['experiment']}, {record['device']}"
        found = ScalingLaw(**law, least=min(flops), most=max(flops), sizes=len(flops), origin=origin)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"scaling={path} is not a scaling.json of tools/scaling.py ({error!r})") from error
    if not (found.least > 0 and found.coefficient > 0 and math.isfinite(found.coefficient + found.exponent)):
        raise UserError(f"scaling={path} has a law or computes that cannot be: {found}")
    return found


@dataclass(frozen=True)
class StageEstimate:
    """One stage of a run.

    Attributes:
        costs: cost per audio-second, by network.
        mfu: share of the GPUs' peak that the operations reach, including recomputed ones.
    """

    stage: Stage
    costs: dict[str, Cost]
    config: EstimateConfig
    parameters: StateSize
    mfu: float

    @property
    def cost(self) -> Cost:
        """Cost per audio-second of all networks."""
        return sum(self.costs.values(), Cost())

    @property
    def audio_seconds(self) -> float:
        """Audio in the whole stage."""
        return self.stage.updates * self.stage.batch_seconds

    @property
    def compute_seconds(self) -> float:
        """Seconds of an update's forward and backward passes, on all GPUs in parallel."""
        peak, _ = GPUS[self.config.gpu].peak(self.config.trainer)
        operations = self.stage.batch_seconds * (self.cost.total + self.cost.recomputed)
        return operations / (self.config.gpus * self.mfu * peak)

    @property
    def step_seconds(self) -> float:
        """Other seconds of an update: sums over the GPUs, as far as no pass hides them, and the optimizers' steps."""
        return seconds_of_step(self.stage, self.config, self.parameters, self.compute_seconds)

    @property
    def update_seconds(self) -> float:
        """Seconds of an update."""
        return self.compute_seconds + self.step_seconds

    @property
    def days(self) -> float:
        """Days for the whole stage."""
        return self.stage.updates * self.update_seconds / 86400


def estimate(
    config: EstimateConfig,
    arguments: Mapping[str, Any],
    tokenizer: MossAudioTokenizerConfig,
    parameters: StateSize,
    mfu: float,
) -> list[StageEstimate]:
    """Estimate the stages of a run, given the arguments of its module and its parameter counts."""
    half, seconds = is_half(config.trainer), config.data.crop_seconds

    @cache
    def text_cost(learns: bool) -> Cost:
        """Return the cost per audio-second of the text LM, averaged over clips with and without text."""
        frames, tokens = (round(seconds * rate) for rate in (tokenizer.frame_rate, config.text_tokens_per_second))
        width = tokenizer.quantizer_kwargs["output_dim"]
        clip = semantic_cost(arguments["semantic"], width, frames, max(1, tokens), half, learns)
        return clip * (config.text_fraction / seconds)

    objective = Objective(tokenizer.output_sampling_rate, **arguments["objective"])
    schedule = Schedule.from_config(arguments["stages"])
    stages = []
    for counted in stage_costs(config, tokenizer, arguments["discriminators"], objective, schedule):
        stage, costs = counted.stage, dict(counted.codec)
        losses = costs.pop("losses")
        if arguments["semantic"] is not None and config.text_fraction:
            costs["text LM"] = text_cost("semantic" in stage.parts)
        if stage.adversarial:
            # Two forwards, real and generated; every n-th update four for the discriminators' own gradients (weights
            # and inputs, twice); one for the generator's gradient, or one for each of its terms.
            crop, passes = counted.discriminators, counted.generator_passes + 4 / stage.discriminator_every
            costs["discriminators"] = (crop * 2 + Cost(backward=passes * crop.forward)) * (1 / seconds)
        stages.append(StageEstimate(stage, costs | {"losses": losses}, config, parameters, mfu))
    return stages


def seconds_of_step(stage: Stage, config: EstimateConfig, parameters: StateSize, compute_seconds: float = 0.0) -> float:
    """Return the seconds of an update apart from its passes: sums over the GPUs that no pass hides, and the steps of
    all optimizers.

    Gradients of whole networks are summed during the last backward pass. Sharded networks are gathered twice and their
    gradients summed during every pass; each GPU steps its shard.

    Args:
        compute_seconds: seconds of all passes of an update; with 0, nothing is hidden.
    """
    trainer, gpus = config.trainer, config.gpus
    passes = max(1, math.ceil(stage.batch_seconds / gpus / config.data.micro_batch_seconds))  # micro-batches of one GPU
    pass_seconds = compute_seconds / passes
    whole = parameters.discriminators if stage.adversarial else 0.0
    divided = float(parameters.tokenizer + parameters.semantic)
    bus, others = config.allreduce_gb_per_second * GB, (gpus - 1) / gpus
    reduced = 2 if trainer.reduce_dtype == "bf16" else 4
    exposed = 0.0
    if trainer.strategy == "fsdp":
        gathered = 2 * (2 if is_half(trainer) else 4)
        exposed = passes * max(0.0, others * divided * (gathered + reduced) / bus - pass_seconds)
        divided /= gpus
    else:
        whole, divided = whole + divided, 0.0
    exposed += exposed_seconds(2 * others * whole * reduced / bus, BACKWARD_SHARE * pass_seconds, whole)
    return exposed + UPDATE_BYTES * (whole + divided) / (GPUS[config.gpu].bandwidth * 1e12)


def exposed_seconds(sums: float, backward: float, parameters: float) -> float:
    """Return the seconds for which summing gradients delays an update, because the last backward pass does not hide it.

    The last bucket is complete only when the pass is over, so it is never hidden.

    Args:
        sums: seconds that summing takes.
        backward: seconds of the last backward pass.
        parameters: number of parameters whose gradients are summed.
    """
    last = sums * min(1.0, BUCKET_BYTES / (4 * parameters)) if parameters else 0.0
    return max(sums - backward, last)
