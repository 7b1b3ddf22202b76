"""Check that a command has what it needs before torch is imported, which takes seconds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moss_train.config.fit_schema import EstimateConfig, FitConfig
from moss_train.config.schema import ExportConfig
from moss_train.config.section import Section
from moss_train.utils.errors import ConfigError, UserError
from moss_train.utils.hub import is_path_like, refuse_missing_model

MODEL_KEYS = ("init", "checkpoint", "model")
"""Keys that name a model; `checkpoint` is a section in `fit`."""
AUDIO = ": give a folder of audio files or a .jsonl manifest"
SHARDS = ": give folders that `moss_train pack` made"
PATH_KEYS = {
    "data.train": SHARDS,
    "data.path": AUDIO,
    "validation.data": AUDIO,
    "semantic.pretrained": "",
    "semantic.text.path": "",
    "input": AUDIO,
    "shards": SHARDS,
    "data": AUDIO,
    "pairs": "",
    "drop": "",
}
"""Keys that name existing files or folders, and what to give."""


def check_inputs(config: Section) -> None:
    """Raise ConfigError for what a command will read and cannot find, or cannot do without.

    A run that has begun keeps copies of what it began with, so its inputs may be gone.
    """
    if isinstance(config, FitConfig):
        _check_parts(config)
        if not isinstance(config, EstimateConfig) and Path(config.run_dir, "checkpoints").exists():
            return
    for key in MODEL_KEYS:
        for name in _texts(config, key):
            try:
                refuse_missing_model(name)
            except UserError as error:
                raise ConfigError("missing", key, name, str(error).partition(" does not exist")[2]) from error
    keys = () if isinstance(config, EstimateConfig) else PATH_KEYS
    for key in keys:
        if key == "data" and isinstance(config, ExportConfig):
            continue  # a sentence for the model card
        for name in _texts(config, key):
            may_be_elsewhere = "://" in name or (key.startswith("semantic.") and not is_path_like(name))
            if not may_be_elsewhere and not Path(name).expanduser().exists():
                raise ConfigError("missing", key, name, PATH_KEYS[key])
    if isinstance(config, FitConfig) and not isinstance(config, EstimateConfig):
        _check_data(config)


def _check_parts(config: FitConfig) -> None:
    if not config.stages:
        raise ConfigError("required", "stages", None, "a run needs one or more")
    if config.init is None and (config.tokenizer is None or config.tokenizer.stages is None):
        raise ConfigError("required", "tokenizer.stages", None, "choose an experiment, or give init=<model>")
    if config.init is not None and config.tokenizer is not None and config.tokenizer.stages is not None:
        expected = (
            "excludes tokenizer.stages, the architecture comes with init: use experiment=finetune or tokenizer=null"
        )
        raise ConfigError("conflict", "init", config.init, expected)


def _check_data(config: FitConfig) -> None:
    if not config.data.train and config.data.path is None:
        expected = (
            "give the folders that `moss_train pack` made, as data.train=/my/shards, or a folder of audio files, as "
            "data.path=/my/audio"
        )
        raise ConfigError("required", "data.train", None, expected)


def _texts(config: Any, key: str) -> Iterator[str]:
    """Yield the texts under a dotted key: one, several of a list, or none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
    yield from (value for value in (config if isinstance(config, list) else [config]) if isinstance(value, str))
