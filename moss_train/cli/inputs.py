"""Refuses models and paths that are not there, before what a verb needs is imported, which takes seconds."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moss_train.utils.errors import UserError
from moss_train.utils.hub import looks_local, refuse_missing_model

MODELS = {"fit": "init", "estimate": "init", "export": "checkpoint"} | dict.fromkeys(
    ("encode", "decode", "evaluate"), "model"
)
PATHS = {
    "fit": ("data.train", "data.path", "validation.data", "semantic.pretrained", "semantic.text.path"),
    "pack": ("input",),
    "inspect": ("shards",),
    "encode": ("input", "shards"),
    "decode": ("input",),
    "evaluate": ("data",),
}


def refuse_missing_inputs(verb: str, config: Mapping[str, Any]) -> None:
    """Raise UserError, naming the key, for what the verb will read and cannot find.

    A run that has begun keeps copies of what it began with, so its inputs may be gone.
    """
    if verb == "fit" and Path(config["run_dir"], "checkpoints").exists():
        return
    for name in _values(config, MODELS.get(verb, "")):
        try:
            refuse_missing_model(name)
        except UserError as error:
            raise UserError(f"{MODELS[verb]}={error}") from error
    for key in PATHS.get(verb, ()):
        for name in _values(config, key):
            may_be_elsewhere = "://" in name or (key.startswith("semantic.") and not looks_local(name))
            if not may_be_elsewhere and not Path(name).expanduser().exists():
                raise UserError(f"{key}={name} does not exist{_what_else(key)}")


def _values(config: Any, key: str) -> Iterator[str]:
    """The texts under a dotted key: one, several of a list, or none."""
    for part in key.split(".") if key else ():
        config = config.get(part) if isinstance(config, Mapping) else None
    yield from (value for value in (config if isinstance(config, list) else [config]) if isinstance(value, str))


def _what_else(key: str) -> str:
    if key in ("data.train", "shards"):
        return ": give folders that `moss_train pack` made"
    if key.startswith("semantic."):
        return ""
    return ": give a folder of audio files or a .jsonl manifest"
