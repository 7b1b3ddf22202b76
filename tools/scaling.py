"""Measure loss against compute: one experiment in several widths, trained on equal data, and a fitted power law.

    python tools/scaling.py --experiment cat_small --scales 0.5 1 1.5 2 --train SHARDS --heldout SHARDS       # one GPU
    python tools/scaling.py --experiment cat_tiny --scales 0.5 0.75 1 --updates 100 --train SHARDS --heldout SHARDS
    python tools/scaling.py ... --rates 0.5 1 --seeds 0 1        # each size at its better rate, mean of two seeds

With `--test SCALE`, a size outside the fit is trained afterwards and compared with the power law's prediction.
Every size is trained on the same clips in the same order with the experiment's schedule, shortened to `--updates`. The
loss is the seven-scale mel distance of held-out clips with all levels. The compute is the FLOPs per second of audio,
counted operation by operation in the first update of every stage (and in the first with the adversarial loss), times
the seconds of audio. Learning rates are those of the experiment times each of `--rates`, and decrease with the width as
1 / scale ** `--rate-exponent`; the rate with the lowest loss is chosen with the first seed.
Writes `scaling.png` and `scaling.json`, which `python -m moss_train estimate experiment=cat_1b6 scaling=FILE` reads,
and a line per run to `runs.jsonl`: the same command continues after an interruption. A power law through a few small
runs predicts the cost of a larger one better than its quality.
"""

import argparse
import datetime
import json
import math
import platform
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moss_train import load_config
from moss_train.batch import UpdateBatch
from moss_train.config.fit_schema import FitConfig
from moss_train.training.cost.flops import FlopCounter
from moss_train.training.module import CatModule
from moss_train.training.run.warm_start import plan_initialization
from tools.short_runs import depth_report, packed_clips, shortened, train_in_memory

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class FirstUpdates(Callback):
    """Counts the FLOPs of each stage's first update, with and without adversarial loss; scales to all audio."""

    def __init__(self) -> None:
        self.counter = FlopCounter()
        self.flops = self.audio_seconds = 0.0
        self.per_audio_second: dict[tuple[str, bool], float] = {}
        self.counted: tuple[str, bool] | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: UpdateBatch, batch_idx: int
    ) -> None:
        schedule_state = pl_module.schedule.at(pl_module.update)  # type: ignore[union-attr,operator]
        kind = (schedule_state.stage.name, schedule_state.adversarial_loss_active)
        if kind not in self.per_audio_second:
            self.counted, self.counter = kind, FlopCounter()
            self.counter.__enter__()
        self.kind = kind

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: UpdateBatch, batch_idx: int
    ) -> None:
        rate = pl_module.tokenizer.sampling_rate  # type: ignore[union-attr]
        seconds = sum(int(micro.audio_lengths.sum()) for micro in batch.micro_batches) / rate  # type: ignore[operator]
        if self.counted is not None:
            self.counter.__exit__(None, None, None)
            self.per_audio_second[self.counted] = self.counter.total / seconds
            self.counted = None
        self.audio_seconds += seconds
        self.flops += self.per_audio_second[self.kind] * seconds


def scaled(config: FitConfig, scale: float, updates: int, rate: float) -> FitConfig:
    """Return the experiment with widths times `scale` in whole heads, rates times `rate`, and about `updates` updates.

    A stage's output width scales with it: equal widths need no projection between stages, so otherwise only some sizes
    would have one, and they would not form one model family.
    """
    stages = []
    assert config.tokenizer is not None
    for stage in config.tokenizer.stages or []:
        heads = max(1, round(stage.num_heads * scale))
        width = heads * (stage.d_model // stage.num_heads)
        handed_on = round(stage.output_dimension * width / stage.d_model)
        stages.append(stage.replace(num_heads=heads, d_model=width, output_dimension=handed_on))
    schedule = [
        stage.replace(learning_rate=stage.learning_rate * rate, final_learning_rate=stage.final_learning_rate * rate)
        for stage in shortened(config.stages, updates)
    ]
    return config.replace(tokenizer=config.tokenizer.replace(stages=stages), stages=schedule)


def run(config: FitConfig, scale: float, rate: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one size once and return its parameters, compute and held-out distance; reuses results in `runs.jsonl`."""
    key = {
        "experiment": [options.experiment, *options.overrides],
        "data": [*options.train, options.heldout, options.clips, options.longest_seconds],
        "updates": options.updates,
        "scale": scale,
        "rate": rate / scale**options.rate_exponent,
        "seed": seed,
    }
    log = options.out / "runs.jsonl"
    for line in log.read_text().splitlines() if log.exists() else []:
        done = json.loads(line)
        if key == {name: done[name] for name in key}:
            return done
    settings = scaled(config, scale, options.updates, key["rate"]).replace(seed=seed)
    module = CatModule(**plan_initialization(settings).arguments)
    meter = FirstUpdates()
    train_in_memory(settings, module, [meter])
    clips = packed_clips(settings, options.heldout, module, options.clips, options.longest_seconds)
    levels = module.tokenizer.config.num_quantizers
    report = depth_report(module.tokenizer.eval(), clips, [levels])
    found = {
        **key,
        "parameters": sum(parameter.numel() for parameter in module.tokenizer.parameters()),
        "audio_seconds": meter.audio_seconds,
        "flops_per_audio_second": meter.flops / meter.audio_seconds,
        "flops": meter.flops,
        "mel_distance": report.distances[levels],
    }
    with open(log, "a") as file:
        file.write(json.dumps(found) + "\n")
    named = {name: found[name] for name in ("scale", "rate", "seed", "parameters", "flops", "mel_distance")}
    print(" ".join(f"{name}={value:.4g}" for name, value in named.items()), flush=True)
    return found


def measure(config: FitConfig, scale: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train one size at every rate, and at the best rate with the other seeds; return the mean over the seeds."""
    first, *others = options.seeds
    best = min(
        (run(config, scale, rate, first, options) for rate in options.rates), key=lambda found: found["mel_distance"]
    )
    rate = best["rate"] * scale**options.rate_exponent
    distances = [best["mel_distance"], *(run(config, scale, rate, seed, options)["mel_distance"] for seed in others)]
    point = {
        name: best[name] for name in ("scale", "rate", "parameters", "audio_seconds", "flops_per_audio_second", "flops")
    }
    return {**point, "mel_distance": fmean(distances), "mel_distance_by_seed": distances}


def fit_power_law(points: list[dict[str, Any]]) -> dict[str, float]:
    """Fit mel distance = coefficient * flops^exponent by least squares on logarithms; needs two sizes or more."""
    x, y = (np.log([point[key] for point in points]) for key in ("flops", "mel_distance"))
    exponent, intercept = np.polyfit(x, y, 1)
    residual = y - (intercept + exponent * x)
    spread = float(((y - y.mean()) ** 2).sum())
    return {
        "coefficient": math.exp(intercept),
        "exponent": float(exponent),
        "r_squared": 1 - float((residual**2).sum()) / spread if spread else 1.0,
    }


def predict(law: dict[str, float], flops: Any) -> Any:
    """Return the mel distance that the power law predicts for an amount of compute."""
    return law["coefficient"] * flops ** law["exponent"]


def plot(
    points: list[dict[str, Any]], law: dict[str, float], tested: dict[str, Any] | None, path: Path, title: str
) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([p["flops"] for p in points], [p["mel_distance"] for p in points], "o", color="tab:blue")
    if tested is not None:
        axes.plot(tested["flops"], tested["mel_distance"], "s", color="tab:orange", label="not in the fit")
        points = [*points, tested]
    flops = np.array([point["flops"] for point in points])
    curve = np.geomspace(flops.min() / 1.3, flops.max() * 1.3, 50)
    label = f"{law['coefficient']:.3g} · FLOP^{law['exponent']:.3f}, R² {law['r_squared']:.2f}"
    axes.plot(curve, predict(law, curve), color="tab:gray", label=label)
    for point in points:
        text = f"{point['parameters'] / 1e6:.1f}M"
        axes.annotate(text, (point["flops"], point["mel_distance"]), xytext=(4, 6), textcoords="offset points")
    axes.set(xscale="log", xlabel="training compute in FLOP", ylabel="held-out mel distance", title=title)
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="cat_small")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0], help="of the widths")
    parser.add_argument("--test", type=float, help="a size to train after the fit, against the law's prediction")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0], help="factors to choose from, for each size")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rate-exponent", type=float, default=1.0, help="0: the same learning rates for every size")
    parser.add_argument("--updates", type=int, default=2000, help="per size, over all stages")
    parser.add_argument("--train", nargs="+", required=True, help="packed folders")
    parser.add_argument("--heldout", required=True, help="packed folder of held-out clips")
    parser.add_argument("--clips", type=int, default=48, help="held-out clips")
    parser.add_argument("--longest-seconds", type=float, default=5.0, help="of a held-out clip")
    parser.add_argument("--out", type=Path, default=Path("scaling"), help="folder of scaling.json and scaling.png")
    options, options.overrides = parser.parse_known_args()
    return options


def main() -> None:
    options = parse_arguments()
    if len(set(options.scales)) < 2:
        raise SystemExit(f"--scales {options.scales}: a law needs at least two sizes")
    paths = [f"data.train={folder}" for folder in options.train]
    config = load_config("fit", [f"experiment={options.experiment}", *paths, *options.overrides])
    options.out.mkdir(parents=True, exist_ok=True)
    points = []
    for scale in options.scales:
        points.append(measure(config, scale, options))
    law = fit_power_law(points)
    print(f"mel distance = {law['coefficient']:.4g} * FLOP^{law['exponent']:.4f}, R² {law['r_squared']:.3f}")
    if law["exponent"] >= 0:
        print("The distance does not fall with compute: the runs are too short, the law predicts nothing.")
    tested = None
    if options.test is not None:
        tested = measure(config, options.test, options)
        tested["predicted_mel_distance"] = predict(law, tested["flops"])
        seen, said = tested["mel_distance"], tested["predicted_mel_distance"]
        print(f"scale {options.test:g}: predicted {said:.4g}, came out at {seen:.4g} ({seen / said - 1:+.1%})")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    record = {
        "experiment": options.experiment,
        "date": datetime.date.today().isoformat(),
        "device": device,
        "torch": torch.__version__,
        "command": "python " + " ".join(sys.argv),
        "points": points,
        "law": law,
        "tested": tested,
    }
    (options.out / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    title = f"{options.experiment}, {points[0]['audio_seconds'] / 60:.0f} min of audio per size"
    plot(points, law, tested, options.out / "scaling.png", title)


if __name__ == "__main__":
    main()
