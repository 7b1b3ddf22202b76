"""Numbers of a `fit` configuration that nothing else checks before they are used: each by its path and its range."""

import math
from collections.abc import Mapping
from typing import Any

from moss_train.utils.errors import UserError

WHOLE = {
    "seed": 0,
    "stop_at_update": 0,
    "fresh_warmup_updates": 0,
    "max_skipped_updates": 1,
    "data.num_workers": 0,
    "data.max_text_tokens": 1,
    "trainer.num_threads": 1,
    "checkpoint.every_updates": 1,
    "checkpoint.keep": 2,
    "checkpoint.archive_every_updates": 1,
}
"""Whole numbers by their least value."""

POSITIVE = (
    "data.crop_seconds",
    "data.max_seconds",
    "data.micro_batch_seconds",
    "data.min_length_ratio",
    "trainer.timeout_seconds",
    "objective.crop_seconds",
)
OPTIONAL = frozenset(
    {"data.max_text_tokens", "stop_at_update", "trainer.num_threads", "checkpoint.archive_every_updates"}
)


def check_numbers(config: Mapping[str, Any]) -> None:
    """Raise UserError with path and value for the first number of the wrong type or out of its range."""
    for path, least in WHOLE.items():
        value = look_up(config, path)
        if value is None and path in OPTIONAL:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise UserError(f"{path}={value} has to be a whole number, at least {least}")
    for path in POSITIVE:
        value = look_up(config, path)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise UserError(f"{path}={value} has to be a number above 0")
    gain = look_up(config, "data.gain_db")
    if gain is not None and not (isinstance(gain, list | tuple) and len(gain) == 2):
        raise UserError(f"data.gain_db={gain} has to be [lowest, highest], or null")


def look_up(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path."""
    value: Any = config
    for key in path.split("."):
        value = value[key]
    return value
