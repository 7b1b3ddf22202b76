"""The `fit` verb."""

import sys
from typing import Any

from moss_train.training.run import fit

SUMMARY = "Train a tokenizer, or go on with a run that was stopped."


def run(config: dict[str, Any]) -> int:
    """Run `fit` and say where the run stands. Returns 0."""
    result = fit(config)
    state = "finished" if result.update >= result.updates else "stopped"
    print(f"{state} at update {result.update} of {result.updates}: {result.directory}", file=sys.stderr)
    return 0
