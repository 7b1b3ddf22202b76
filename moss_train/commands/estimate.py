"""`estimate`: memory, time and cost of a run before it starts."""

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from moss_train.config.fit_schema import EstimateConfig
from moss_train.semantic import resolve_lm_config
from moss_train.training.cost.estimate import GB, UPDATE_BYTES, ScalingLaw, StageEstimate, estimate, read_scaling_law
from moss_train.training.cost.hardware import GIB, GPUS, is_half
from moss_train.training.cost.mfu import measured_share
from moss_train.training.run.fit import count_parameters_on_meta
from moss_train.training.run.warm_start import plan_initialization

SUMMARY = "Say what a run will need before it starts: parameters, memory, operations, days."

EXAMPLES = (
    "python -m moss_train estimate experiment=cat_1b6 gpu=h100 gpus=64",
    "python -m moss_train estimate experiment=cat_nano gpu=rtx4090 gpus=1 mfu=0.3 stages.0.updates=100000",
    "python -m moss_train estimate experiment=finetune init=my-tokenizer gpu=a100 gpus=1",
    "python -m moss_train estimate experiment=cat_1b6 'trainer.activation_checkpointing=[100,50]' mfu=runs/cat_1b6/one",
    "python -m moss_train estimate experiment=cat_1b6 scaling=scaling/scaling.json  # of tools/scaling.py",
)
SHORT_UPDATE_SECONDS = 0.1  # below this, launching the operations takes longer than computing them
MODELLED_MFU = 0.3  # the default
CONTEXT_BYTES = GIB  # of the CUDA context and its libraries, an assumption


def run(config: EstimateConfig) -> int:
    """Count, estimate and print. Returns 0."""
    law = None if config.scaling is None else read_scaling_law(config.scaling)
    mfu = measured_share(config.mfu) if isinstance(config.mfu, str) else config.mfu
    init_plan = plan_initialization(config)
    semantic = init_plan.arguments["semantic"]
    arguments = {**init_plan.arguments, "semantic": None if semantic is None else resolve_lm_config(semantic)}
    size = count_parameters_on_meta(arguments, config)
    stages = estimate(config, arguments, init_plan.tokenizer_config, size, mfu)
    # Memory on each GPU: with the whole state, and, if there are several GPUs, with a part of it (FSDP).
    kinds: dict[str, float] = {"CUDA context (assumed)": CONTEXT_BYTES}
    if is_half(config.trainer):
        copied = size.tokenizer + size.semantic + size.discriminators
        kinds = {"bf16 copies of weights": 2.0 * copied} | kinds
    placed = {"1 GPU" if config.gpus == 1 else "DDP": size.kinds | kinds}
    if config.gpus > 1:
        placed[f"FSDP over {config.gpus}"] = replace(size, shards=config.gpus).kinds | kinds
    parameters = Table("network", "parameters", title="parameters")
    parameters.add_row("tokenizer", f"{size.tokenizer:,}")
    parameters.add_row("text LM", f"{size.semantic:,}")
    parameters.add_row("discriminators", f"{size.discriminators:,}")
    console = Console(width=max(Console().width, 110))
    for table in (parameters, cost_table(stages), time_table(stages), memory_table(placed)):
        console.print(table)
    lines = memory_lines(config, stages, placed, size.checkpoint_bytes)
    lines += [] if law is None else scaling_lines(stages, law)
    lines += assumptions(config, stages, mfu)
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return 0


def cost_table(stages: list[StageEstimate]) -> Table:
    """Return the operations per audio-second of each network in each stage."""
    table = Table("", "forward", "backward", "together", title="GFLOP per audio-second")
    for stage in stages:
        table.add_section()
        for name, cost in {**stage.costs, "all": stage.cost}.items():
            gflops = (f"{value / 1e9:,.2f}" for value in (cost.forward, cost.backward, cost.total))
            table.add_row(f"{stage.stage.name}: {name}", *gflops)
    return table


def time_table(stages: list[StageEstimate]) -> Table:
    """Return the speed and the duration of each stage."""
    columns = ("stage", "updates", "audio-s", "s/update", "optimizer", "audio-s/s", "updates/h", "audio hours", "days")
    table = Table(
        *columns,
        title="time (audio-s per update; audio-s/s are audio-h/h; optimizer: fraction after the passes)",
    )
    for s in stages:
        seconds, audio = s.update_seconds, s.stage.batch_seconds
        table.add_row(
            s.stage.name,
            f"{s.stage.updates:,}",
            f"{audio:,.0f}",
            f"{seconds:,.3g}",
            f"{s.step_seconds / seconds:.0%}",
            f"{audio / seconds:,.0f}",
            f"{3600 / seconds:,.0f}",
            f"{s.audio_seconds / 3600:,.0f}",
            in_days(s.days),
        )
    table.add_section()
    updates, hours = sum(s.stage.updates for s in stages), sum(s.audio_seconds for s in stages) / 3600
    table.add_row("all", f"{updates:,}", *[""] * 5, f"{hours:,.0f}", in_days(sum(s.days for s in stages)))
    return table


def in_days(days: float) -> str:
    """Return days with one decimal; less than one day with two significant digits."""
    return f"{days:,.1f}" if days >= 1 else f"{days:.2g}"


def memory_table(placed: dict[str, dict[str, float]]) -> Table:
    """Return the memory of one GPU by kind, for each way to place the state."""
    table = Table("GiB on each GPU", *placed, title="memory")
    for kind in next(iter(placed.values())):
        table.add_row(kind, *(f"{sizes[kind] / GIB:.2f}" for sizes in placed.values()))
    table.add_section()
    table.add_row("together", *(f"{sum(sizes.values()) / GIB:.2f}" for sizes in placed.values()))
    return table


def memory_lines(
    config: EstimateConfig, stages: list[StageEstimate], placed: dict[str, dict[str, float]], checkpoint_bytes: float
) -> list[str]:
    """Describe the memory of activations, the longest micro-batch that fits, and gain and cost of checkpointing."""
    micro = config.data.micro_batch_seconds
    most = max((stage.cost for stage in stages), key=lambda cost: cost.activation_bytes)
    sizes = most.activation_bytes, max(stage.cost.checkpointed_bytes for stage in stages)
    lines = []
    for name, state in placed.items():
        left = GPUS[config.gpu].memory * GB - sum(state.values())
        longest = [left / size for size in sizes]
        fit = "fits" if longest[0] >= micro else "does not fit" if longest[1] < micro else "fits checkpointed only"
        lines.append(
            f"{name}: data.micro_batch_seconds={micro:g} {fit}; at most {max(longest[0], 0):.0f} s, "
            f"{max(longest[1], 0):.0f} s with activation checkpointing of all layers"
        )
    lines += [
        f"activations: {sizes[0] / 1e6:.1f} MB per second of a micro-batch, "
        f"{sizes[1] / 1e6:.1f} MB with all layers checkpointed",
        f"checkpoint: {checkpoint_bytes / GB:.1f} GB",
    ]
    if rates := config.trainer.activation_checkpointing:
        costs = (f"{stage.stage.name} +{stage.cost.recomputed / stage.cost.total:.1%}" for stage in stages)
        lines.append(
            f"trainer.activation_checkpointing={list(rates)}, counted in all of this, saves "
            f"{most.checkpointing_savings / 1e6:.1f} MB per second of a micro-batch and takes longer: "
            f"{', '.join(costs)} operations"
        )
    return lines


def scaling_lines(stages: list[StageEstimate], law: ScalingLaw) -> list[str]:
    """Return the held-out distance that a measured scaling law predicts for parts of the run's compute."""
    whole, whole_days = sum(s.audio_seconds * s.cost.total for s in stages), sum(s.days for s in stages)
    lines = [
        f"scaling law of {law.sizes} runs ({law.origin}): mel distance = {law.coefficient:.4g} * "
        f"FLOP^{law.exponent:.4f}, R2 {law.r_squared:.3f}, measured from {law.least:.3g} to {law.most:.3g} FLOP"
    ]
    for share in (0.01, 0.1, 1.0):
        flops, days = share * whole, share * whole_days
        lines.append(
            f"  {share:.0%} of the compute, {flops:.3g} FLOP, about {days:,.1f} days: mel distance "
            f"{law.distance(flops):.3f} ({law.describe_range(flops)})"
        )
    return [*lines, "  held-out data, losses and schedule as in those runs; other ones move the law"]


def assumptions(config: EstimateConfig, stages: list[StageEstimate], mfu: float) -> list[str]:
    """Return the assumptions of the estimate, among them what it leaves out."""
    peak, kind = GPUS[config.gpu].peak(config.trainer)
    origin = f" (measured: {config.mfu})" if isinstance(config.mfu, str) else ""
    if config.mfu == MODELLED_MFU:
        origin = " (a model, not a measurement: tools/model_gpu.py)"
    lines = [
        "Assumptions:",
        f"  mfu={mfu:g}{origin} of {peak / 1e12:g} TFLOP/s ({config.gpu}, dense {kind}, data sheet), all included",
        f"  clips of data.crop_seconds={config.data.crop_seconds:g} s",
        f"  text_fraction={config.text_fraction:g} of the audio, {config.text_tokens_per_second:g} tokens a second",
        f"  gradients summed at {config.allreduce_gb_per_second:g} GB/s (busbw), beside the last backward pass (with "
        f"fsdp beside every pass); then {UPDATE_BYTES} bytes of memory traffic per parameter and step",
        "  no restarts, no waiting for data, no validation",
    ]
    if any(stage.update_seconds < SHORT_UPDATE_SECONDS for stage in stages):
        lines.append(f"  updates of less than {SHORT_UPDATE_SECONDS} s wait for the CPU: this run takes longer")
    return lines
