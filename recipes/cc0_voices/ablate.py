"""Train a model of one voice with many variants of the settings and print one row of results per variant and seed.

    python recipes/cc0_voices/ablate.py SHARDS HELDOUT out/ablations --seeds 0 1 [--only base small_batch]

Each run does 1,500 updates of 5.76 s in about five minutes on one core; README.md has the commands that pack one voice.
Finished runs are not repeated, and interrupted ones continue.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

RUN = [
    "experiment=cat_tiny",
    "semantic=null",
    "discriminators=[]",
    "objective.weights.relative_error=30",
    "validation.max_clips=40",
    "validation.metrics_clips=40",
    "validation.metrics=[stoi,pitch]",
    "validation.every_updates=100000",
    "validation.samples_every_updates=100000",
    "checkpoint.every_updates=500",
    "ema={decay: 0.998}",
    "stages=[{name: continuous, updates: 200, quantize: false, batch_seconds: 5.76, learning_rate: 2.0e-3,"
    " final_learning_rate: 1.5e-3, warmup_updates: 50}, {name: quantized, updates: 1300, batch_seconds: 5.76,"
    " learning_rate: 1.5e-3, final_learning_rate: 1.0e-4, warmup_updates: 20}]",
]
THIRD = (
    "stages=[{{name:continuous,updates:200,quantize:false,batch_seconds:5.76,learning_rate:2e-3,"
    "final_learning_rate:1.5e-3,warmup_updates:50}},{{name:quantized,updates:800,batch_seconds:5.76,"
    "learning_rate:1.5e-3,final_learning_rate:7e-4,warmup_updates:20}},{{name:last,updates:500,batch_seconds:5.76,"
    "learning_rate:7e-4,final_learning_rate:1e-4,warmup_updates:0,weights:{{relative_error:{}}}}}]"
)
CHANGES = {
    "base": "",
    "small_batch": "stages.0.batch_seconds=2.88 stages.1.batch_seconds=2.88 stages.0.updates=400"
    " stages.1.updates=2600 stages.0.warmup_updates=100 stages.1.warmup_updates=40",
    "big_batch": "stages.0.batch_seconds=11.52 stages.1.batch_seconds=11.52 stages.0.updates=100"
    " stages.1.updates=650 stages.0.warmup_updates=25 stages.1.warmup_updates=10",
    "constant_rate": "stages.0.final_learning_rate=2e-3 stages.1.learning_rate=1e-3 stages.1.final_learning_rate=1e-3",
    "rate_3e-3": "stages.0.learning_rate=3e-3 stages.0.final_learning_rate=3e-3 stages.1.learning_rate=3e-3",
    "relative_error_0": "objective.weights.relative_error=0",
    "relative_error_100": "objective.weights.relative_error=100",
    "one_continuous_update": "stages.0.updates=1 stages.1.updates=1499 stages.0.warmup_updates=0"
    " stages.1.warmup_updates=50 stages.1.learning_rate=2e-3",
    "layer_scale_1": "tokenizer.layer_scale=1.0",
    "width_192": "tokenizer.stages.0.d_model=192 tokenizer.stages.0.num_heads=6",
    "betas_0.99": "optimizers.generator.betas=[0.9,0.99]",
    "two_thirds_30": THIRD.format(30),
    "two_thirds_3": THIRD.format(3),
}
"""Name -> overrides."""


def main() -> int:
    """Run the requested variants and print the table. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=list(CHANGES), default=list(CHANGES))
    options = parser.parse_args()
    for seed in options.seeds:
        for name in options.only:
            run_dir = options.out / f"{name}_s{seed}"
            overrides = [*RUN, f"seed={seed}", *CHANGES[name].split()]
            paths = [f"data.train={options.train}", f"validation.data={options.heldout}", f"run_dir={run_dir}"]
            subprocess.run([sys.executable, "-m", "moss_train", "fit", *overrides, *paths], check=True)
    print("change | seed | mel at 1 / 4 / 8 / 16 levels | STOI at 1 / 4 / 16 | pitch at 1 / 4 / 16 | seconds")
    for name in options.only:
        for seed in options.seeds:
            print(" | ".join(row(options.out / f"{name}_s{seed}", name, seed)))
    return 0


def row(run_dir: Path, name: str, seed: int) -> list[str]:
    """Return the table cells of one run: its last validation and the total seconds of its updates."""
    with open(run_dir / "validation.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    with open(run_dir / "metrics.csv", newline="") as file:
        seconds = sum(float(update["update_seconds"]) for update in csv.DictReader(file))
    mel = " / ".join(f"{float(last[f'mel_distance/{levels}']):.2f}" for levels in (1, 4, 8, 16))
    stoi = " / ".join(f"{float(last[f'all/stoi/{levels}']):.3f}" for levels in (1, 4, 16))
    pitch = " / ".join(f"{float(last[f'all/pitch/{levels}']):.2f}" for levels in (1, 4, 16))
    return [name, str(seed), mel, stoi, pitch, f"{seconds:.0f}"]


if __name__ == "__main__":
    sys.exit(main())
