"""What a measured scaling law (`scaling.json` of tools/scaling.py) says about a bigger run."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_train.utils.errors import UserError

FAR = 10.0
"""Extrapolation beyond so many times the largest measured compute is far."""


@dataclass(frozen=True)
class ScalingLaw:
    """mel distance = coefficient * FLOP^exponent, on held-out clips with all levels.

    Attributes:
        r_squared: how well it fits the measured runs.
        least, most: compute of the measured runs in FLOP.
        sizes: how many of them there are.
        origin: experiment and device, for people.
    """

    coefficient: float
    exponent: float
    r_squared: float
    least: float
    most: float
    sizes: int
    origin: str

    def distance(self, flops: float) -> float:
        """Predicted mel distance after so much compute."""
        return self.coefficient * math.exp(self.exponent * math.log(flops))

    def verdict(self, flops: float) -> str:
        """How far a prediction lies from what was measured."""
        if self.exponent >= 0:
            return "predicts nothing: the measured distance does not fall with compute"
        if flops <= self.most:
            return "inside the measured range" if flops >= self.least else "below the measured range"
        factor = flops / self.most
        text = f"{factor:,.3g} times the largest measured compute"
        return f"{text}: a far extrapolation, hardly more than a guess" if factor > FAR else text


def read_scaling_law(path: str | Path) -> ScalingLaw:
    """Read the file of tools/scaling.py. Raises UserError when it is missing or not such a file."""
    try:
        record: Mapping[str, Any] = json.loads(Path(path).read_text("utf-8"))
        law, flops = record["law"], [float(point["flops"]) for point in record["points"]]
        found = ScalingLaw(
            coefficient=float(law["coefficient"]),
            exponent=float(law["exponent"]),
            r_squared=float(law["r_squared"]),
            least=min(flops),
            most=max(flops),
            sizes=len(flops),
            origin=f"{record['experiment']}, {record['device']}",
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"scaling={path} is not a scaling.json of tools/scaling.py ({error!r})") from error
    if not (found.least > 0 and found.coefficient > 0 and math.isfinite(found.coefficient + found.exponent)):
        raise UserError(f"scaling={path} has a law or computes that cannot be: {found}")
    return found
