"""Plot a run's validation metrics against its updates.

python recipes/cat_mini/curves.py out/voices recipes/cat_mini/curves.png
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
    """Read the run's validation.csv and metrics.csv and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--levels", nargs="+", type=int, default=[1, 4, 8, 16])
    arguments = parser.parse_args()
    rows = read_rows(arguments.run / "validation.csv")[1:]  # without the row of the untrained model
    panels = [
        Panel(title, [curve(rows, f"{name}/{levels}", f"{levels}") for levels in arguments.levels], dots=True)
        for name, title in MEASURES.items()
    ]
    text = [curve(rows, column, name) for column, name in TEXT.items()]
    panels.append(Panel("cross entropy of the text LM (nats per byte)", text, dots=True))
    stages: dict[str, float] = {}
    for row in read_rows(arguments.run / "metrics.csv"):
        stages.setdefault(row["stage"], float(row["update"]))
    save_curves(panels, arguments.picture, "Held-out sentences of the three voices", stages)


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
