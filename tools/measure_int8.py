"""Measure the quality cost of int8 weights: ONNX graphs with float32 and int8 weights on the same held-out clips.

    OMP_NUM_THREADS=1 python tools/measure_int8.py recipes/cat_mini data/cc0_voices/heldout.jsonl

Exports both kinds of graphs, evaluates both with `evaluate`, and prints the table of recipes/BENCHMARKS.md: the values
of float32, the differences with 95 % intervals over paired clips, and the fraction of codes that differ. Results that
are already in `--out` are reused.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from moss_train.cli.main import main as moss_train

METRICS = "metrics=[stoi,pesq,spectral,pitch]"


def evaluate(options: argparse.Namespace, weights: str, *arguments: str) -> dict[str, Any]:
    """Export and evaluate one type of weights, and return the content of results.json."""
    graphs, out = options.out / f"graphs-{weights}", options.out / weights
    if not graphs.exists():
        arguments_of_export = [f"checkpoint={options.model}", f"out={graphs}", "format=onnx", f"weights={weights}"]
        if moss_train(["export", *arguments_of_export]) != 0:
            raise SystemExit(1)
    levels = ",".join(map(str, options.levels))
    common = [f"model={graphs}", f"data={options.clips}", f"out={out}", f"num_quantizers=[{levels}]", METRICS]
    settings = ["anchors=false", "report_clips=0", f"max_clips={options.max_clips}"]
    if moss_train(["evaluate", *common, *settings, *arguments]) != 0:
        raise SystemExit(1)
    return json.loads((out / "results.json").read_text("utf-8"))


def table(exact: dict[str, Any], rounded: dict[str, Any]) -> str:
    """Return values and differences by number of levels as Markdown."""
    (comparison,) = rounded["comparisons"]
    columns = list(dict.fromkeys(item["column"] for item in comparison["differences"]))
    lines = [f"| levels | | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for row in sorted(exact["rows"], key=lambda row: row["condition"]["num_quantizers"]):
        levels = row["condition"]["num_quantizers"]
        found = {
            item["column"]: item["estimate"]
            for item in comparison["differences"]
            if item["first"]["num_quantizers"] == item["second"]["num_quantizers"] == levels
        }
        values = (f"{value['mean']:.3f}" for value in row["estimates"].values())  # in column order
        changes = (f"{e['mean']:+.3f} ± {(e['high'] - e['low']) / 2:.3f}" for e in (found[name] for name in columns))
        lines += [f"| {levels} | float32 | {' | '.join(values)} |"]
        lines += [f"| | int8 less float32 | {' | '.join(changes)} |"]
    return "\n".join(lines)


def changed_codes(first: Path, second: Path) -> str:
    """Describe how many of the codes saved by two evaluations differ."""
    pairs = [(np.load(path), np.load(second / "codes" / path.name)) for path in sorted((first / "codes").glob("*.npy"))]
    differs = np.concatenate([one != other for one, other in pairs], axis=1)
    return f"{differs.mean():.1%} of {differs.size:,} codes differ, {differs[0].mean():.1%} of the first level"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run, checkpoint or model folder")
    parser.add_argument("clips", help="held-out clips, as data= of evaluate")
    parser.add_argument("--max-clips", type=int, default=20)
    parser.add_argument("--levels", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--out", type=Path, default=Path("out/int8"))
    options = parser.parse_args()
    exact = evaluate(options, "float32")
    rounded = evaluate(options, "int8", f"compare=[{options.out / 'float32'}]")
    print(f"\n{table(exact, rounded)}\n\n{changed_codes(options.out / 'float32', options.out / 'int8')}")


if __name__ == "__main__":
    main()
