"""The inference model of anything that holds one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel
from moss_train.utils.checkpoints import CHECKPOINT_FILE, find_damage, newest_checkpoint
from moss_train.utils.errors import UserError

PREFIX = "tokenizer."


def load_tokenizer(path: str | Path) -> MossAudioTokenizerModel:
    """Load the tokenizer of a run, a checkpoint, an exported or released folder, or a repository name.

    Returns:
        The model in evaluation mode, float32, on the CPU.

    Raises:
        UserError: there is no model at `path`, or its weights do not fit its configuration.
    """
    directory = Path(path)
    if (checkpoint := find_checkpoint(directory)) is not None:
        return tokenizer_of_checkpoint(checkpoint).eval()
    looks_local = str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1
    if looks_local and not directory.exists():
        raise UserError(f"{path} does not exist: give a run, a checkpoint or a model folder, or a repository name")
    if directory.exists() and not (directory / "config.json").exists():
        raise UserError(f"{path} is neither a run, a checkpoint nor a model folder: it has no config.json")
    try:
        return MossAudioTokenizerModel.from_pretrained(str(path), dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a tokenizer from {path}: {str(error).splitlines()[0]}") from error


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that a path means: itself, or the newest sound one of a run; None for anything else."""
    if (path / CHECKPOINT_FILE).exists():
        if problem := find_damage(path):
            raise UserError(f"checkpoint {path} is damaged: {problem}")
        return path
    for directory in (path, path / "checkpoints"):
        if (checkpoint := newest_checkpoint(directory)) is not None:
            return checkpoint
    return None


def tokenizer_of_checkpoint(path: Path) -> MossAudioTokenizerModel:
    """Build the tokenizer that a training checkpoint describes and load its weights, strictly."""
    checkpoint = torch.load(path / CHECKPOINT_FILE, map_location="cpu", weights_only=True, mmap=True)
    model = MossAudioTokenizerModel(tokenizer_config(checkpoint["hyper_parameters"]["tokenizer"]))
    weights = checkpoint["state_dict"]
    model.load_state_dict({name.removeprefix(PREFIX): weights[name] for name in weights if name.startswith(PREFIX)})
    return model


def tokenizer_config(node: Mapping[str, Any]) -> MossAudioTokenizerConfig:
    """Configuration from the released keys or from five numbers per stage, as runs store it."""
    if "stages" in node:
        return MossAudioTokenizerConfig.from_stages(**node)
    return MossAudioTokenizerConfig(**node)
