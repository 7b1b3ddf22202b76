"""Estimate memory, time and cost of a run before it starts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moss_train.config.fit_schema import FitConfig, TrainerConfig
from moss_train.model import MossAudioTokenizerConfig
from moss_train.training.cost.flops import Cost, discriminators_cost, losses_cost, semantic_cost, tokenizer_costs
from moss_train.training.cost.hardware import GIB, GPUS, StateSize, is_half
from moss_train.training.step.objective import Objective
from moss_train.training.step.schedule import Schedule, Stage
from moss_train.utils.errors import UserError
from moss_train.utils.files import read_json

FAR = 10.0
"""Extrapolation beyond so many times the largest measured compute is far."""


@dataclass(frozen=True)
class ScalingLaw:
    """mel distance = coefficient * FLOP^exponent, on held-out clips with all levels.

    Attributes:
        r_squared: how well it fits the measured runs.
        least, most: compute of the measured runs in FLOP.
        sizes: how many of them there are.
        origin: experiment and device, for people.
    """

    coefficient: float
    exponent: float
    r_squared: float
    least: float
    most: float
    sizes: int
    origin: str

    def distance(self, flops: float) -> float:
        """Predicted mel distance after so much compute."""
        return self.coefficient * math.exp(self.exponent * math.log(flops))

    def describe_range(self, flops: float) -> str:
        """How far a prediction lies from what was measured."""
        if self.exponent >= 0:
            return "predicts nothing: the measured distance does not fall with compute"
        if flops <= self.most:
            return "inside the measured range" if flops >= self.least else "below the measured range"
        factor = flops / self.most
        text = f"{factor:,.3g} times the largest measured compute"
        return f"{text}: a far extrapolation, hardly more than a guess" if factor > FAR else text


def read_scaling_law(path: str | Path) -> ScalingLaw:
    """Read the file of tools/scaling.py. Raises UserError when it is missing or not such a file."""
    try:
        record: Mapping[str, Any] = read_json(Path(path))
        law, flops = record["law"], [float(point["flops"]) for point in record["points"]]
        found = ScalingLaw(
            coefficient=float(law["coefficient"]),
            exponent=float(law["exponent"]),
            r_squared=float(law["r_squared"]),
            least=min(flops),
            most=max(flops),
            sizes=len(flops),
            origin=f"{record['experiment']}, {record['device']}",
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"scaling={path} is not a scaling.json of tools/scaling.py ({error!r})") from error
    if not (found.least > 0 and found.coefficient > 0 and math.isfinite(found.coefficient + found.exponent)):
        raise UserError(f"scaling={path} has a law or computes that cannot be: {found}")
    return found


Node = Mapping[str, Any]
GB = 1e9
UPDATE_BYTES = 50  # per parameter in the memory of a GPU: copied for the sum 8, norm 4, AdamW and clipping 32, cast 6
BACKWARD_SHARE = 2 / 3  # of a pass: two products for each one forward
BUCKET_BYTES = 64 * 2**20  # of gradients that are summed at once: the last one has nothing to be beside
CONTEXT_BYTES = GIB  # of the CUDA context and its libraries, an assumption


@dataclass(frozen=True)
class ClusterSpec:
    """What a run is to be trained on.

    Attributes:
        gpu, gpus: name in GPUS, and how many.
        mfu: share of the peak that the operations reach, those done a second time included; an assumption until it is
            measured (`hfu` in metrics.csv).
        text_fraction: of the audio that comes with text, an assumption about the data.
        text_tokens_per_second: of such audio, likewise.
        allreduce_gb_per_second: of a sum over all GPUs, as nccl-tests report it (busbw); assumed.
    """

    gpu: str
    gpus: int
    mfu: float
    text_fraction: float
    text_tokens_per_second: float
    allreduce_gb_per_second: float


@dataclass(frozen=True)
class StageEstimate:
    """One stage of a run.

    Attributes:
        costs: per audio-second, by network.
        audio_seconds: in the whole stage.
        compute_seconds: of an update in which all GPUs work on its audio.
        step_seconds: of an update after that: what no pass hides of the sums over the GPUs, then the optimizers step.
    """

    stage: Stage
    costs: dict[str, Cost]
    audio_seconds: float
    compute_seconds: float
    step_seconds: float

    @property
    def rate(self) -> float:
        """Audio-seconds per second on all GPUs."""
        return self.stage.batch_seconds / (self.compute_seconds + self.step_seconds)

    @property
    def operations(self) -> float:
        """Operations per audio-second, each once."""
        return sum(cost.total for cost in self.costs.values())

    @property
    def recomputed(self) -> float:
        """Operations per audio-second that are done a second time."""
        return sum(cost.recomputed for cost in self.costs.values())

    @property
    def days(self) -> float:
        """Days for the whole stage."""
        return self.audio_seconds / self.rate / 86400

    @property
    def updates_per_hour(self) -> float:
        """Updates in an hour."""
        return self.rate * 3600 / self.stage.batch_seconds


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU.

    Attributes:
        state: weights, gradients and so on by kind, when every GPU has all of them.
        sharded: the same when tokenizer and LM are divided among the GPUs.
        per_second: kept between forward and backward, per second of a micro-batch; of the most expensive stage.
        per_second_checkpointed: the same when every layer computes its activations again.
        per_second_saved: what `trainer.activation_checkpointing` takes off `per_second`.
    """

    state: dict[str, float]
    sharded: dict[str, float]
    per_second: float
    per_second_checkpointed: float
    per_second_saved: float


@dataclass(frozen=True)
class Estimate:
    """Everything that `estimate` prints."""

    parameters: StateSize
    stages: list[StageEstimate]
    memory: MemoryEstimate
    checkpoint_bytes: float

    @property
    def days(self) -> float:
        """Days of all stages."""
        return sum(stage.days for stage in self.stages)


def estimate(
    config: FitConfig, arguments: Node, tokenizer: MossAudioTokenizerConfig, parameters: StateSize, cluster: ClusterSpec
) -> Estimate:
    """Estimate a run of a `fit` configuration, given the arguments of its module and the parameters counted."""
    half, seconds = is_half(config.trainer), config.data.crop_seconds

    @cache
    def constant_costs(learning: tuple[str, ...]) -> dict[str, Cost]:
        """Costs per audio-second of what every stage has, for clips of `data.crop_seconds`; the LM's as their mean."""
        costs = tokenizer_costs(tokenizer, seconds, half, learning, config.trainer.activation_checkpointing)
        if arguments["semantic"] is not None and cluster.text_fraction:
            frames = round(seconds * tokenizer.frame_rate)
            tokens = max(1, round(seconds * cluster.text_tokens_per_second))
            width = tokenizer.quantizer_kwargs["output_dim"]
            clip = semantic_cost(arguments["semantic"], width, frames, tokens, half, "semantic" in learning)
            costs["text LM"] = clip * (cluster.text_fraction / seconds)
        return costs

    objective = Objective(tokenizer.output_sampling_rate, **arguments["objective"])
    peak, _ = GPUS[cluster.gpu].peak(config.trainer)
    stages = []
    for stage in Schedule.from_config(arguments["stages"]).stages:
        costs = dict(constant_costs(stage.parts))
        if stage.adversarial:
            nodes, crop = arguments["discriminators"], objective.crop_length
            one = discriminators_cost(nodes, tokenizer.number_channels, crop, half)
            # Two forwards, real and generated; every n-th update four for the discriminators' own gradients (weights
            # and inputs, twice); one for the generator's gradient, or one for each of its terms.
            backward = objective.generator_passes(stage) + 4 / stage.discriminator_every
            kept = 2 * one.activation_bytes
            costs["discriminators"] = Cost(2 * one.forward, backward * one.forward, kept, kept) * (1 / seconds)
        costs["losses"] = losses_cost(objective, objective.stage_weights(stage), tokenizer)
        operations = stage.batch_seconds * sum(cost.total + cost.recomputed for cost in costs.values())
        compute_seconds = operations / (cluster.gpus * cluster.mfu * peak)
        passes = num_passes(stage, cluster, config.data.micro_batch_seconds)
        step_seconds = seconds_of_step(stage, config.trainer, parameters, cluster, passes, compute_seconds / passes)
        stages.append(StageEstimate(stage, costs, stage.updates * stage.batch_seconds, compute_seconds, step_seconds))
    everything = parameters.tokenizer + parameters.semantic + parameters.discriminators
    average = 4 * parameters.tokenizer if config.ema is not None else 0
    return Estimate(parameters, stages, memory_estimate(config, stages, parameters, cluster), 12 * everything + average)


def num_passes(stage: Stage, cluster: ClusterSpec, micro_batch_seconds: float) -> int:
    """Micro-batches of one GPU in an update."""
    return max(1, math.ceil(stage.batch_seconds / cluster.gpus / micro_batch_seconds))


def seconds_of_step(
    stage: Stage,
    trainer: TrainerConfig,
    parameters: StateSize,
    cluster: ClusterSpec,
    passes: int = 1,
    pass_seconds: float = 0.0,
) -> float:
    """Time of an update beside its passes: sums over the GPUs that no pass hides, and the steps of all optimizers.

    Whole networks are summed beside the last backward pass. Sharded ones are gathered twice in every pass and their
    gradients summed, beside its operations; each GPU steps its share.

    Args:
        passes: of one GPU in an update.
        pass_seconds: of one of them; 0 to have nothing hidden.
    """
    whole = parameters.discriminators if stage.adversarial else 0.0
    divided = float(parameters.tokenizer + parameters.semantic)
    bus, others = cluster.allreduce_gb_per_second * GB, (cluster.gpus - 1) / cluster.gpus
    reduced = 2 if trainer.reduce_dtype == "bf16" else 4
    exposed = 0.0
    if trainer.strategy == "fsdp":
        gathered = 2 * (2 if is_half(trainer) else 4)
        exposed = passes * max(0.0, others * divided * (gathered + reduced) / bus - pass_seconds)
        divided /= cluster.gpus
    else:
        whole, divided = whole + divided, 0.0
    exposed += exposed_seconds(2 * others * whole * reduced / bus, BACKWARD_SHARE * pass_seconds, whole)
    return exposed + UPDATE_BYTES * (whole + divided) / (GPUS[cluster.gpu].bandwidth * 1e12)


def exposed_seconds(sums: float, backward: float, parameters: float) -> float:
    """What the last backward pass, of so many seconds, does not hide of sums of the gradients of so many parameters.

    The last bucket is complete only when the pass is over.
    """
    last = sums * min(1.0, BUCKET_BYTES / (4 * parameters)) if parameters else 0.0
    return max(sums - backward, last)


def memory_estimate(
    config: FitConfig, stages: list[StageEstimate], parameters: StateSize, cluster: ClusterSpec
) -> MemoryEstimate:
    """Memory of one GPU by kind."""
    divided, whole = parameters.tokenizer + parameters.semantic, parameters.discriminators
    held = []
    for shards in (1, cluster.gpus):  # of tokenizer and text LM
        parameters_held = divided / shards + whole
        kinds = {"weights": 4 * parameters_held, "gradients": 4 * parameters_held, "AdamW moments": 8 * parameters_held}
        if config.ema is not None:
            kinds["moving average"] = 4.0 * parameters.tokenizer / shards
        if is_half(config.trainer):
            kinds["bf16 copies of weights"] = 2.0 * (divided + whole)
        held.append(kinds | {"CUDA context (assumed)": CONTEXT_BYTES})
    sums = [sum(stage.costs.values(), Cost()) for stage in stages]
    most = max(sums, key=lambda cost: cost.activation_bytes)
    checkpointed = max(cost.checkpointed_bytes for cost in sums)
    return MemoryEstimate(held[0], held[1], most.activation_bytes, checkpointed, most.checkpointing_savings)
