"""Plot validation metrics against updates, of one run or of several that continue each other.

python recipes/cat_mini/curves.py out/voices out/voices_more --out recipes/cat_mini/curves.png
"""

import argparse
import csv
from pathlib import Path

from moss_train.plotting import Curve, Panel, save_curves

MEASURES = {
    "mel_distance": "mel distance, by number of levels",
    "all/stoi": "STOI",
    "all/pesq_nb": "PESQ-NB",
    "all/pitch": "voiced frames with the right pitch",
}
TEXT = {"text_lm_loss": "given the audio", "text_lm_loss_no_audio": "without"}


def main() -> None:
    """Read validation.csv and metrics.csv of every run and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run directories; each was started from the one before it")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--levels", nargs="+", type=int, default=[1, 4, 8, 16])
    arguments = parser.parse_args()
    rows: list[dict[str, str]] = []
    stages: dict[str, float] = {}
    for run in arguments.runs:
        start = float(rows[-1]["update"]) if rows else 0.0
        for row in read_rows(run / "metrics.csv"):
            stages.setdefault(row["stage"], start + float(row["update"]))
        validated = [row for row in read_rows(run / "validation.csv") if int(row["update"]) > 0]
        rows += [row | {"update": str(start + float(row["update"]))} for row in validated]
    panels = [
        Panel(title, [curve(rows, f"{name}/{levels}", f"{levels}") for levels in arguments.levels], dots=True)
        for name, title in MEASURES.items()
    ]
    text = [curve(rows, column, name) for column, name in TEXT.items()]
    panels.append(Panel("cross entropy of the text LM (nats per byte)", text, dots=True))
    save_curves(panels, arguments.out, "Held-out sentences of the three voices", stages)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return all rows of a table."""
    with path.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def curve(rows: list[dict[str, str]], column: str, name: str) -> Curve:
    """Return the values of a column in the rows that have one."""
    points = [(float(row["update"]), float(row[column])) for row in rows if row.get(column)]
    return Curve(name, [update for update, _ in points], [value for _, value in points])


if __name__ == "__main__":
    main()
