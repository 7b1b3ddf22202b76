"""The `estimate` verb."""

from typing import Any

from rich.console import Console
from rich.table import Table

from moss_train.semantic.portable import spelled_out
from moss_train.training.estimation import GB, GPUS, Estimate, Machine, estimate
from moss_train.training.initialization import plan_beginning
from moss_train.training.resources import GIB
from moss_train.training.run import build_schedule, measure

SUMMARY = "Say what a run will need before it starts: parameters, memory, operations, days."

EXAMPLES = (
    "python -m moss_train estimate experiment=cat_1b6 gpu=h100 gpus=64",
    "python -m moss_train estimate experiment=cat_nano gpu=rtx4090 gpus=1 mfu=0.3 stages.0.updates=100000",
    "python -m moss_train estimate experiment=finetune init=my-tokenizer gpu=a100 gpus=1",
)
MACHINE_KEYS = ("gpu", "gpus", "mfu", "text_share", "text_tokens_per_second")


def run(config: dict[str, Any]) -> int:
    """Count, estimate and print. Returns 0."""
    machine = Machine(**{key: config[key] for key in MACHINE_KEYS})
    beginning = plan_beginning(config)
    build_schedule(beginning.arguments["stages"])
    semantic = beginning.arguments["semantic"]
    arguments = {**beginning.arguments, "semantic": None if semantic is None else spelled_out(semantic)}
    parameters = measure(arguments, config)
    result = estimate(config, arguments, beginning.tokenizer_config, parameters, machine)
    console = Console(width=max(Console().width, 110))
    for table in (parameter_table(result), cost_table(result), time_table(result), memory_table(result, machine)):
        console.print(table)
    lines = [*memory_lines(config, result, machine), *assumptions(config, machine)]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return 0


def parameter_table(result: Estimate) -> Table:
    """Parameters of each network."""
    table = Table("network", "parameters", title="parameters")
    size = result.parameters
    for name, count in (
        ("tokenizer", size.tokenizer),
        ("text LM", size.semantic),
        ("discriminators", size.discriminators),
    ):
        table.add_row(name, f"{count:,}")
    return table


def cost_table(result: Estimate) -> Table:
    """Operations per audio-second of each network in each stage."""
    table = Table("", "forward", "backward", "together", title="GFLOP per audio-second")
    for stage in result.stages:
        table.add_section()
        for name, cost in stage.costs.items():
            table.add_row(f"{stage.stage.name}: {name}", *gigas(cost.forward, cost.backward, cost.total))
        forward, backward = (sum(getattr(c, k) for c in stage.costs.values()) for k in ("forward", "backward"))
        table.add_row(f"{stage.stage.name}: all", *gigas(forward, backward, stage.operations))
    return table


def gigas(*operations: float) -> list[str]:
    """Operations in units of 1e9."""
    return [f"{value / 1e9:,.2f}" for value in operations]


def time_table(result: Estimate) -> Table:
    """How fast the stages go and how long they last."""
    columns = ("stage", "updates", "audio-s per update", "audio-s/s", "updates/h", "audio-h/h", "audio hours", "days")
    table = Table(*columns, title="time")
    for s in result.stages:
        numbers = (s.stage.updates, s.stage.batch_seconds, s.rate, s.updates_per_hour, s.rate, s.audio_seconds / 3600)
        table.add_row(s.stage.name, *(f"{number:,.0f}" for number in numbers), f"{s.days:,.1f}")
    table.add_section()
    hours = sum(s.audio_seconds for s in result.stages) / 3600
    table.add_row(
        "all", f"{sum(s.stage.updates for s in result.stages):,}", *[""] * 4, f"{hours:,.0f}", f"{result.days:,.1f}"
    )
    return table


def memory_table(result: Estimate, machine: Machine) -> Table:
    """Memory of one GPU by kind, replicated and divided among the GPUs."""
    table = Table("GiB on each GPU", "DDP", f"FSDP over {machine.gpus}", title="memory")
    for kind, size in result.memory.state.items():
        table.add_row(kind, f"{size / GIB:.2f}", f"{result.memory.sharded[kind] / GIB:.2f}")
    sums = (sum(sizes.values()) / GIB for sizes in (result.memory.state, result.memory.sharded))
    table.add_section()
    table.add_row("together", *(f"{total:.2f}" for total in sums))
    return table


def memory_lines(config: dict[str, Any], result: Estimate, machine: Machine) -> list[str]:
    """What activations take, and the longest micro-batch that fits."""
    memory, micro = result.memory, config["data"]["micro_batch_seconds"]
    available = GPUS[machine.gpu].memory * GB
    lines = []
    for name, state in (("DDP", memory.state), ("FSDP", memory.sharded)):
        left = available - sum(state.values())
        longest = [left / size for size in (memory.per_second, memory.per_second_checkpointed)]
        verdict = "fits" if longest[0] >= micro else "does not fit" if longest[1] < micro else "fits checkpointed only"
        lines.append(
            f"{name}: data.micro_batch_seconds={micro:g} {verdict}; at most {max(longest[0], 0):.0f} s, "
            f"{max(longest[1], 0):.0f} s with activation checkpointing of all layers"
        )
    kept = (memory.per_second / 1e6, memory.per_second_checkpointed / 1e6)
    lines.append(f"activations: {kept[0]:.1f} MB per second of a micro-batch, {kept[1]:.1f} MB checkpointed")
    lines.append(f"checkpoint: {result.checkpoint_bytes / GB:.1f} GB")
    return lines


def assumptions(config: dict[str, Any], machine: Machine) -> list[str]:
    """Everything that was not counted."""
    peak, kind = machine.peak(config["trainer"])
    return [
        "Assumptions:",
        f"  mfu={machine.mfu:g} of {peak / 1e12:g} TFLOP/s ({machine.gpu}, dense {kind}, data sheet), all included",
        f"  clips of data.crop_seconds={config['data']['crop_seconds']:g} s",
        f"  text_share={machine.text_share:g} of the audio, with {machine.text_tokens_per_second:g} tokens per second",
        "  trainer.activation_checkpointing is not counted: neither the memory that it saves nor its second forward",
        "  no restarts, no waiting for data, no validation",
    ]
