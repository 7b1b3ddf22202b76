"""Compare the processor time and the losses of a training update in this tree and in another one.

    git worktree add /tmp/old 964e7b3
    python tools/compare_training.py /tmp/old --experiment cat_tiny --stages reconstruction adversarial

Each tree trains in its own process on the same updates of noise. They alternate, one round each while the other waits,
so that other work on the machine affects both alike. `--experiment-file` gives both the same experiment where theirs
differ. The reported minimum is the least disturbed round. Trees from before the typed configuration work too.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]


def train(folder: Path, experiment: str, configs: Path, stage: str) -> None:
    """Train one stage: each line of standard input requests a number of updates; print their time and losses."""
    sys.path[:0] = [str(folder), str(folder / "tools")]
    import bench_training as bench
    import torch

    torch.set_num_threads(1)
    overrides = [f"experiment={experiment}", "semantic=null"]
    if hasattr(bench, "load_config"):
        config = bench.load_config("fit", [*overrides, "data.train=[x]"], configs)
        batch_seconds = next(one.batch_seconds for one in config.stages if one.name == stage)
        clip = config.data.crop_seconds
    else:
        config = bench.to_plain(bench.compose("fit", overrides, configs), "fit")
        batch_seconds = next(one["batch_seconds"] for one in config["stages"] if one["name"] == stage)
        clip = config["data"]["crop_seconds"]
    options = argparse.Namespace(shards=None, micro_batch_seconds=batch_seconds, micro_batches=1, updates=1000)
    case = bench.Case(stage, False, clip, clip)
    settings = bench.case_config(config, case, options)
    module = bench.CatModule(**bench.plan_initialization(settings).arguments)
    updates = bench.synthetic_updates(settings, case, module)
    trainer = (
        settings["trainer"] | {"devices": 1} if isinstance(settings, dict) else settings.trainer.replace(devices=1)
    )
    state = {"left": int(input()), "begin": time.process_time()}

    class Turns(bench.Callback):  # type: ignore[name-defined,misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            state["left"] -= 1
            if state["left"] == 0:
                metrics = pl_module.metrics if hasattr(pl_module, "metrics") else outputs["result"].metrics
                print(json.dumps([time.process_time() - state["begin"], metrics]), flush=True)
                state["left"] = int(sys.stdin.readline() or 0)
                trainer.should_stop = state["left"] == 0
                state["begin"] = time.process_time()

    loader = bench.DataLoader(updates, batch_size=None, collate_fn=bench.unchanged)
    bench.build_trainer(trainer, "cpu", [Turns()]).fit(module, loader)


def compare(options: argparse.Namespace, configs: Path, stage: str) -> None:
    """Compare one stage and print a line of the table."""
    trees = {}
    for name, folder in (("other", options.other.resolve()), ("here", HERE)):
        command = [sys.executable, __file__, str(folder), "--worker", stage, "--experiment", options.experiment]
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        arguments = [*command, "--configs", str(configs)]
        trees[name] = subprocess.Popen(arguments, env=environment, cwd=folder, text=True, **pipes)  # type: ignore[call-overload]
    times: dict[str, list[float]] = {name: [] for name in trees}
    losses: dict[str, dict[str, float]] = {}
    for turn in range(options.rounds + 1):
        for name, process in trees.items():
            count = 1 if turn == 0 else options.updates  # the first update creates windows, filters and moments
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
            seconds, metrics = json.loads(next(line for line in process.stdout if line.startswith("[")))
            if turn == 0:
                losses[name] = metrics
            else:
                times[name].append(1e3 * seconds / count)
    for process in trees.values():
        process.stdin.close()
        process.wait()
    shared = [name for name in losses["other"].keys() & losses["here"].keys() if name.startswith("loss/")]
    difference = max(abs(losses["here"][name] / losses["other"][name] - 1) for name in shared)
    cells = [f"{min(values):.0f}, {statistics.median(values):.0f}" for values in times.values()]
    quotients = [function(times["other"]) / function(times["here"]) for function in (min, statistics.median)]
    print(f"{stage} | {' | '.join(cells)} | {', '.join(f'{q:.2f}' for q in quotients)} | {difference:.0e}", flush=True)


def main() -> None:
    """Compare both trees, or run as one of the two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="checkout of the commit to compare with")
    parser.add_argument("--experiment", default="cat_tiny")
    parser.add_argument("--experiment-file", type=Path, help="for both trees, in place of their own")
    parser.add_argument("--stages", nargs="*", default=["reconstruction", "adversarial"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--updates", type=int, default=2, help="per round")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--configs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train(options.other, options.experiment, options.configs, options.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "experiment").mkdir()
        if options.experiment_file is not None:
            options.experiment = "compared"
            shutil.copy(options.experiment_file, Path(folder) / "experiment" / "compared.yaml")
        print("stage | other: least, median ms per update | here | times as fast: least, median | losses differ by")
        for stage in options.stages:
            compare(options, Path(folder), stage)


if __name__ == "__main__":
    main()
