"""Load the tokenizer from a run, a checkpoint, an export or a released folder, and its training networks."""

import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from moss_train.export.training_state import STATE_FOLDER, read_training_state
from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel
from moss_train.utils.checkpoint import CHECKPOINT_FILE, find_damage, newest_checkpoint, read_payload
from moss_train.utils.errors import UserError
from moss_train.utils.hub import from_pretrained, refuse_missing_model

LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    AttributeError,
    SafetensorError,
    pickle.UnpicklingError,
)
NETWORKS = ("semantic", "discriminators")  # of a training, beside the tokenizer
Weights = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class ModelSource:
    """A tokenizer to go on from and, where they were kept, the networks of its training.

    Attributes:
        path: what it is, for messages.
        tokenizer: its architecture.
        nodes: by name (`semantic`, `discriminators`) what builds the other networks; empty for a released folder.
        load: reads the weights of `tokenizer` and of every network of `nodes`, on the CPU.
    """

    path: str
    tokenizer: MossAudioTokenizerConfig
    nodes: Mapping[str, Any]
    load: Callable[[], Weights]


def open_source(path: str | Path) -> ModelSource:
    """Open what training can go on from, see `load_tokenizer` for what `path` may be; weights are not read yet.

    Raises:
        UserError: there is no model at `path`, or its training state is damaged.
    """
    if (checkpoint := find_checkpoint(Path(path))) is not None:
        content = read_checkpoint(checkpoint)
        parameters = content["hyper_parameters"]
        nodes = {name: parameters[name] for name in NETWORKS if parameters.get(name)}
        return ModelSource(
            str(checkpoint), tokenizer_config(parameters["tokenizer"]), nodes, lambda: weights_of(content, nodes)
        )
    config = from_folder(MossAudioTokenizerConfig, path)
    folder = Path(path) / STATE_FOLDER
    networks = read_training_state(folder) if folder.is_dir() else {}
    nodes = {name: network.node for name, network in networks.items()}

    def load() -> Weights:
        others = {name: network.weights for name, network in networks.items()}
        return {"tokenizer": load_tokenizer(path).state_dict(), **others}

    return ModelSource(str(path), config, nodes, load)


def weights_of(content: Mapping[str, Any], nodes: Iterable[str]) -> Weights:
    """The weights of tokenizer and networks in a checkpoint's content."""
    return {name: weights_under(f"{name}.", content["state_dict"]) for name in ("tokenizer", *nodes)}


def load_tokenizer(path: str | Path, *, ema: bool = False) -> MossAudioTokenizerModel:
    """Load the tokenizer of a run, a checkpoint, an exported or released folder, or a repository name.

    Args:
        ema: the moving average of the weights instead, which a run with `ema` keeps.

    Returns:
        The model in evaluation mode, float32, on the CPU.

    Raises:
        UserError: there is no model at `path`, its weights do not fit its configuration, or there is no average.
    """
    if (checkpoint := find_checkpoint(Path(path))) is not None:
        content = read_checkpoint(checkpoint)
        if ema and not content.get("ema"):
            raise UserError(
                f"{checkpoint} has no moving average: train with ema={{decay: 0.9999}}, or leave out ema=true"
            )
        model = tokenizer_of(content)
        if ema:
            model.load_state_dict(content["ema"]["weights"])
        return model.eval()
    if ema:
        raise UserError(f"{path} is no run or checkpoint: only those have a moving average (ema=true)")
    return from_folder(MossAudioTokenizerModel, path, dtype=torch.float32).eval()


def from_folder(kind: Any, path: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained` of a model folder or repository name, with errors of one line."""
    refuse_missing_model(str(path))
    if Path(path).exists() and not (Path(path) / "config.json").exists():
        raise UserError(f"{path} is neither a run, a checkpoint nor a model folder: it has no config.json")
    try:
        return from_pretrained(kind, str(path), **options)
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(f"cannot load a tokenizer from {path}: {_first_line(error)}") from error


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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Content of a checkpoint directory; its tensors stay on the disk until they are used."""
    return read_payload(path, mmap=True)


def tokenizer_of(content: Mapping[str, Any]) -> MossAudioTokenizerModel:
    """Build the tokenizer that a checkpoint's content describes and load its weights, strictly. Raises UserError."""
    try:
        model = MossAudioTokenizerModel(tokenizer_config(content["hyper_parameters"]["tokenizer"]))
        model.load_state_dict(weights_under("tokenizer.", content["state_dict"]))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"the checkpoint does not hold a tokenizer: {_first_line(error)}") from error
    return model


def weights_under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}


def tokenizer_config(node: Mapping[str, Any]) -> MossAudioTokenizerConfig:
    """Configuration from the released keys or from five numbers per stage, as runs store it."""
    if "stages" in node:
        return MossAudioTokenizerConfig.from_stages(**node)
    return MossAudioTokenizerConfig(**node)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
