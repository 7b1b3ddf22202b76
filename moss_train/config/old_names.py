"""Old names of keys and of columns of tables, which are still read."""

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
    "ValidationConfig": {"levels": "num_quantizers"},
    "EstimateConfig": {"text_share": "text_fraction", "bus_gb_per_second": "allreduce_gb_per_second"},
    "DoctorConfig": {"run_directory": "run_dir"},
    "EvaluateConfig": {"workers": "num_workers", "failures": "missing_values", "code": "code_dir"},
    "ExportConfig": {"which": "select"},
    "InspectConfig": {"clipped_share": "clipped_fraction"},
    "PackConfig": {"max_bad_share": "max_invalid_fraction"},
}
"""By the name of the section's class: old key -> new key."""

REMOVED: dict[str, dict[str, str]] = {
    "EvaluateConfig": {
        "blind": "the report has no votes any more",
        "speaker": "speaker similarity is the published one, with the weights of speaker_model",
    },
}
"""Keys that no longer have an effect: if an old command line or file has one, it is ignored with this explanation."""


def new_name(section: type, key: str) -> str:
    """Return the current name of a section's key."""
    return next((RENAMED[base.__name__][key] for base in section.__mro__ if key in RENAMED.get(base.__name__, ())), key)


def removal_reason(section: type, key: str) -> str | None:
    """Return why a key no longer has an effect; None for a key that has one or never existed."""
    return next((reasons[key] for base in section.__mro__ if key in (reasons := REMOVED.get(base.__name__, {}))), None)


def rename_keys(section: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values of a section under their current names; if both names of a key are given, the new one wins."""
    values = {key: value for key, value in values.items() if not removal_reason(section, key)}
    names = {key: new_name(section, key) for key in values}
    if all(old == new for old, new in names.items()):
        return values
    renamed = {new: values[old] for old, new in names.items() if old != new}
    return renamed | {key: value for key, value in values.items() if names[key] == key}


RENAMED_COLUMNS = {
    "discriminator/real": "discriminator_score/real",
    "discriminator/generated": "discriminator_score/generated",
    "other_seconds": "callback_seconds",
    "text_nats": "text_lm_loss",
    "text_nats_blind": "text_lm_loss_no_audio",
    "text_correct": "text_accuracy",
    "alive": "active_fraction",
    "top_share": "max_probability",
}
"""Columns of tables: old name -> new name; also for columns with a number of levels, such as `text_nats/8`."""


def present_column(name: str) -> str:
    """Return the current name of a column."""
    base, slash, levels = name.rpartition("/")
    if levels.isdigit():
        return f"{RENAMED_COLUMNS.get(base, base)}{slash}{levels}"
    return RENAMED_COLUMNS.get(name, name)
