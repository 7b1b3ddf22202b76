"""Check from a run's tables whether it shows the effects of the joint objective; exit with status 1 if it does not."""

import argparse
import csv
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

USED = 0.8  # a codebook counts as used when more than this share of its entries occurs


@dataclass(frozen=True)
class Claim:
    """A statement that a run's results confirm or refute, with the numbers behind it."""

    text: str
    numbers: str
    holds: bool


def main() -> None:
    """Print the claims about the run's last validation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run with validation.csv, and blind.csv of blind_lm.py")
    run = parser.parse_args().run
    row = read_table(run / "validation.csv")[-1]
    blind = run / "blind.csv"
    found = claims(row, min(line["text_lm_loss"] for line in read_table(blind)) if blind.exists() else None)
    print("| | | holds |\n|---|---|---|")
    for claim in found:
        print(f"| {claim.text} | {claim.numbers} | {'yes' if claim.holds else 'no'} |")
    sys.exit(0 if all(claim.holds for claim in found) else 1)


def read_table(path: Path) -> list[dict[str, float]]:
    """Return the rows of a CSV file of numbers, without empty cells."""
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def claims(row: Mapping[str, float], blind_nats: float | None) -> list[Claim]:
    """Evaluate all claims on a row of `validation.csv`; without the blind LM's nats, those about text are left out."""
    return ([] if blind_nats is None else text_claims(row, blind_nats)) + [depth_claim(row), use_claim(row)]


def text_claims(row: Mapping[str, float], blind_nats: float) -> list[Claim]:
    """Check that the LM uses audio: it beats the best LM trained without audio, and itself without this audio."""
    heard, unheard = row["text_lm_loss"], row["text_lm_loss_no_audio"]
    return [
        Claim("text given its audio is below the best blind LM", f"{heard:.3f}, {blind_nats:.3f}", heard < blind_nats),
        Claim("and below the same LM without this audio", f"{heard:.3f}, {unheard:.3f}", heard < unheard),
    ]


def depth_claim(row: Mapping[str, float]) -> Claim:
    """Check that every further tested depth lowers the mel distance."""
    names = [name.split("/") for name in row if name.startswith("mel_distance/")]
    depths = sorted(int(name[1]) for name in names if len(name) == 2)
    mel = [row[f"mel_distance/{depth}"] for depth in depths]
    text = f"mel distance falls with depth ({', '.join(map(str, depths))} levels)"
    return Claim(text, ", ".join(f"{value:.3f}" for value in mel), all(b < a for a, b in pairwise(mel)))


def use_claim(row: Mapping[str, float]) -> Claim:
    """Check that the codebooks do not collapse: most levels use most of their entries."""
    usage = [value for name, value in row.items() if name.startswith("usage/")]
    used = sum(value > USED for value in usage)
    text = f"over {100 * USED:.0f} % of the entries are used on most levels"
    return Claim(text, f"{used} of {len(usage)}", 2 * used > len(usage))


if __name__ == "__main__":
    main()
