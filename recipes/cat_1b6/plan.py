"""Compute the plan for training `cat_1b6` on three million hours and print it as the README.md of this folder.

python recipes/cat_1b6/plan.py > recipes/cat_1b6/README.md
"""

from dataclasses import replace

from moss_train import load_config
from moss_train.training.cost.estimate import GB, StageEstimate, estimate
from moss_train.training.run.fit import count_parameters_on_meta
from moss_train.training.run.warm_start import plan_initialization

HOURS = 3_000_000
GPUS = (64, 256, 512)
MFU = 0.3
BUS_GB_PER_SECOND = 300.0
TEXT_SHARE = 0.3
FLAC_KBIT_PER_SECOND = 178  # 24 kHz mono, an assumption: real corpora lie between 150 and 300
SHARD_BYTES = 2 * 10**9
GPU_HOURS_PER_FAILURE = 50_000  # order of a published large run: 419 unexpected stops in 54 days on 16,384 H100
RESTART_MINUTES = 15.0
CHECKPOINT_MINUTES = 35.0
CHECKPOINT_GB_PER_SECOND = 0.5
ARCHIVE_UPDATES = 60_000

TEXT = """# cat_1b6 on three million hours

The whole plan, computed by `python recipes/cat_1b6/plan.py` (this file is its output, a test compares them). Counted:
parameters, operations, checkpoint size. Everything under "assumed" is not measured here: replace it by what a first day
on your machines shows, and print the plan again.

| assumed | | source |
|---|---|---|
| share of the H100's dense bf16 peak | {mfu:.0%} | a model, `tools/model_gpu.py`; to be measured on your machines |
| sum of gradients over all GPUs (busbw) | {bus:.0f} GB/s | nccl-tests on your network |
| audio with text | {text:.0%} | about the data |
| FLAC, 24 kHz mono | {kbit} kbit/s | corpora lie between 150 and 300; `inspect` tells |
| one unexpected stop per | {failure:,} GPU-hours | order of what was published for 16,384 H100 |
| restart | {restart:.0f} min | until the first update |
| checkpoints | {speed} GB/s | written, hashed and read back while all GPUs wait: `checkpoint_seconds` in metrics.csv |

| counted | |
|---|---|
| tokenizer / text LM / discriminators | {tokenizer:,} / {semantic:,} / {discriminators:,} parameters |
| stage 1 / stage 2 | {cost1:.1f} / {cost2:.1f} GFLOP per audio-second |
| audio used by both stages | {used:,.0f} hours, {passes:.2f} passes over {hours:,} hours |
| shards of {shard:.0f} GB | {num_shards:,.0f}, {storage:,.0f} TB |
| checkpoint | {checkpoint:.1f} GB |
| kept: two newest, best, end of stage 1, one in {archive:,} updates | {kept}: {kept_size:.0f} GB |

| H100 GPUs | audio-s/s | read GB/s | stepping | stage 1, days | stage 2 | GPU-hours | stops | lost | days in all |
|---|---|---|---|---|---|---|---|---|---|
{rows}

Stepping: share of stage 1 / 2 in which gradients are summed (in bf16, beside the last backward pass) and
optimizers step.
The published batch is fixed, so with more GPUs each computes less between two sums, and the same money buys less. A
larger batch is another recipe.

Lost: per stop half of the {cadence:.0f} minutes between checkpoints and the restart, and the time of all checkpoints.
`checkpoint.every_updates` for that cadence at {first} GPUs: {every:,}; with more, raise it in proportion. Validate in
the same updates, as the experiment does, so that the best checkpoint is a regular one.

Run it, the same command after every stop:

```bash
SHARDS=/shards NODES=8 RENDEZVOUS=node0:29400 bash recipes/cat_1b6/torchrun.sh name=first  # on each of 8 machines
SHARDS=/shards NODES=8 bash recipes/cat_1b6/slurm.sh name=first                            # or as a SLURM job
```

`settings.sh` holds what both pass on: the sets, `trainer.reduce_dtype=bf16`, `checkpoint.every_updates={every}` and
`checkpoint.keep_every_updates={archive_plain}`.

`python tools/simulate_cluster.py` checks the data order for 256 ranks over a million shards before the first GPU is
rented; `python -m moss_train estimate experiment=cat_1b6 gpus=64` prints the memory of each GPU."""


def main() -> None:
    """Print the plan."""
    assumed = [f"text_fraction={TEXT_SHARE}", f"allreduce_gb_per_second={BUS_GB_PER_SECOND}", f"gpus={GPUS[0]}"]
    config = load_config("estimate", ["experiment=cat_1b6", "trainer.reduce_dtype=bf16", "gpu=h100", *assumed])
    init_plan = plan_initialization(config)
    parameters = count_parameters_on_meta(init_plan.arguments, config)
    stages = estimate(config, init_plan.arguments, init_plan.tokenizer_config, parameters, MFU)
    plans = {gpus: [replace(stage, config=config.replace(gpus=gpus)) for stage in stages] for gpus in GPUS}
    used = sum(stage.audio_seconds for stage in stages) / 3600
    byte_rate = FLAC_KBIT_PER_SECOND * 1000 / 8
    storage = HOURS * 3600 * byte_rate
    every = 1000 * round(60 * CHECKPOINT_MINUTES / stages[0].update_seconds / 1000)
    updates = sum(stage.stage.updates for stage in stages)
    writing_days = updates / every * parameters.checkpoint_bytes / (CHECKPOINT_GB_PER_SECOND * GB) / 86400
    kept = 4 + updates // ARCHIVE_UPDATES
    print(
        TEXT.format(
            **vars(parameters),
            mfu=MFU,
            text=TEXT_SHARE,
            bus=BUS_GB_PER_SECOND,
            kbit=FLAC_KBIT_PER_SECOND,
            failure=GPU_HOURS_PER_FAILURE,
            restart=RESTART_MINUTES,
            cost1=stages[0].cost.total / 1e9,
            cost2=stages[1].cost.total / 1e9,
            used=used,
            passes=used / HOURS,
            hours=HOURS,
            shard=SHARD_BYTES / GB,
            num_shards=storage / SHARD_BYTES,
            storage=storage / 1e12,
            checkpoint=parameters.checkpoint_bytes / GB,
            kept=kept,
            kept_size=kept * parameters.checkpoint_bytes / GB,
            speed=CHECKPOINT_GB_PER_SECOND,
            archive=ARCHIVE_UPDATES,
            archive_plain=ARCHIVE_UPDATES,
            rows="\n".join(row(plan, gpus, byte_rate, writing_days) for gpus, plan in plans.items()),
            cadence=CHECKPOINT_MINUTES,
            first=GPUS[0],
            every=every,
        )
    )


def row(stages: list[StageEstimate], gpus: int, byte_rate: float, writing_days: float) -> str:
    """Return the table row for a number of GPUs, from its estimate and the time spent writing checkpoints."""
    rates = [stage.stage.batch_seconds / stage.update_seconds for stage in stages]
    stepping = " / ".join(f"{stage.step_seconds / stage.update_seconds:.0%}" for stage in stages)
    training_days = sum(stage.days for stage in stages)
    gpu_hours = training_days * 24 * gpus
    stops = gpu_hours / GPU_HOURS_PER_FAILURE
    lost_days = stops * (CHECKPOINT_MINUTES / 2 + RESTART_MINUTES) / 60 / 24 + writing_days
    total = training_days + lost_days
    days = (f"{stage.days:.2f}" for stage in stages)
    numbers = (f"{rates[0]:,.0f}", f"{max(rates) * byte_rate / GB:.2f}", stepping, *days)
    share = lost_days / total
    return f"| {gpus} | {' | '.join(numbers)} | {gpu_hours:,.0f} | {stops:.2f} | {share:.2%} | {total:.2f} |"


if __name__ == "__main__":
    main()
