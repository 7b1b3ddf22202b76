"""Keys that have another name now: the old one is still read, from YAML, command line, runs and checkpoints."""

from collections.abc import Mapping
from typing import Any

RENAMED: dict[str, dict[str, str]] = {
    "FitConfig": {
        "train": "trainable",
        "allow_changes": "allow_config_changes",
        "stop_at_update": "max_updates",
        "fresh_warmup_updates": "new_module_warmup_updates",
    },
    "StageConfig": {"train": "trainable", "decay_share": "decay_fraction"},
    "DataConfig": {"heldout_share": "heldout_fraction", "max_bad_share": "max_invalid_fraction"},
    "ObjectiveConfig": {"crop_seconds": "discriminator_crop_seconds"},
    "LoggingConfig": {"gradient_shares_every_updates": "log_gradient_shares_every"},
    "HealthConfig": {"grace_updates": "ignore_first_updates"},
    "CheckpointConfig": {
        "keep": "keep_last",
        "archive_every_updates": "keep_every_updates",
        "best": "monitor",
    },
    "EstimateConfig": {"text_share": "text_fraction", "bus_gb_per_second": "allreduce_gb_per_second"},
    "EvaluateConfig": {"workers": "num_workers", "failures": "missing_values"},
    "ExportConfig": {"which": "select"},
    "InspectConfig": {"clipped_share": "clipped_fraction"},
    "PackConfig": {"max_bad_share": "max_invalid_fraction"},
}
"""By the name of the section's class: old key -> new key."""


def new_name(section: type, key: str) -> str:
    """Return the present name of a section's key."""
    return next((RENAMED[base.__name__][key] for base in section.__mro__ if key in RENAMED.get(base.__name__, ())), key)


def rename_keys(section: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values of a section under their present names; of two names for one key the new one counts."""
    names = {key: new_name(section, key) for key in values}
    if all(old == new for old, new in names.items()):
        return values
    renamed = {new: values[old] for old, new in names.items() if old != new}
    return renamed | {key: value for key, value in values.items() if names[key] == key}
