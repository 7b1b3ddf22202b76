"""Load a tokenizer and its training networks from a run, a checkpoint, an export or a released folder."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel
from moss_train.utils.checkpoint import CHECKPOINT_FILE, find_damage, newest_checkpoint, read_payload, weights_under
from moss_train.utils.errors import UserError, first_line
from moss_train.utils.files import read_json
from moss_train.utils.hub import check_model_name, from_pretrained

LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError, UnpicklingError)
NETWORKS = ("semantic", "discriminators")  # of a training, beside the tokenizer
Weights = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class ModelSource:
    """A tokenizer to continue from and, where they were kept, the networks of its training.

    Attributes:
        path: what it is, for messages.
        tokenizer: its architecture.
        nodes: by name (`semantic`, `discriminators`) what builds the other networks; empty for a released folder.
        load: reads the weights of `tokenizer` and of every network of `nodes`, on the CPU.
        objective: arguments of the objective that the networks were trained with; empty for a folder.
    """

    path: str
    tokenizer: MossAudioTokenizerConfig
    nodes: Mapping[str, Any]
    load: Callable[[], Weights]
    objective: Mapping[str, Any] = field(default_factory=dict)


def open_source(path: str | Path) -> ModelSource:
    """Open a model that training can continue from; `path` as in `load_tokenizer`. Its weights are not read yet.

    Raises:
        UserError: there is no model at `path`, or its training state is damaged.
    """
    if (checkpoint := find_checkpoint(Path(path))) is not None:
        content = read_payload(checkpoint, mmap=True)  # tensors stay on the disk until they are used
        parameters = content["hyper_parameters"]
        nodes = {name: parameters[name] for name in NETWORKS if parameters.get(name)}

        def load() -> Weights:
            weights = {name: weights_under(f"{name}.", content["state_dict"]) for name in ("tokenizer", *nodes)}
            return weights | {"tokenizer": weights["tokenizer"] | moving_average(content)}  # as `load_tokenizer`

        objective = parameters.get("objective") or {}
        return ModelSource(str(checkpoint), tokenizer_config(parameters["tokenizer"]), nodes, load, objective)
    config = from_folder(MossAudioTokenizerConfig, path)
    folder = Path(path) / STATE_FOLDER
    nodes, weights = read_training_state(folder) if folder.is_dir() else ({}, {})
    return ModelSource(str(path), config, nodes, lambda: {"tokenizer": load_tokenizer(path).state_dict(), **weights})


def load_tokenizer(path: str | Path, *, ema: bool | None = None, part: str | None = None) -> MossAudioTokenizerModel:
    """Load the tokenizer of a run, a checkpoint, an exported or released folder, or a repository name.

    Args:
        ema: True for the moving average of the weights, False for the weights themselves; None for the average, as in
            validation, if the run keeps one.
        part: "encoder" or "decoder" reads only that half of a folder or repository; runs are read whole.

    Returns:
        The model in evaluation mode, float32, on the CPU.

    Raises:
        UserError: there is no model at `path`, its weights do not fit its configuration, or there is no average.
    """
    if (checkpoint := find_checkpoint(Path(path))) is not None:
        content = read_payload(checkpoint, mmap=True)
        average = moving_average(content)
        if ema and not average:
            raise UserError(
                f"{checkpoint} has no moving average: train with ema={{decay: 0.9999}}, or leave out ema=true"
            )
        try:
            model = MossAudioTokenizerModel(tokenizer_config(content["hyper_parameters"]["tokenizer"]))
            model.load_state_dict(weights_under("tokenizer.", content["state_dict"]))
            if average and ema is not False:
                model.load_state_dict(average)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"the checkpoint does not hold a tokenizer: {first_line(error)}") from error
        return model.eval()
    if ema:
        raise UserError(f"{path} is no run or checkpoint: only those have a moving average (ema=true)")
    options = {} if part is None else {"part": part}
    return from_folder(MossAudioTokenizerModel, path, dtype=torch.float32, **options).eval()


def moving_average(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the averaged weights in the content of a checkpoint; none without `ema`, or before the first update."""
    kept = content.get("ema")
    return kept.get("weights") or {} if isinstance(kept, Mapping) else {}


def from_folder(kind: Any, path: str | Path, **options: Any) -> Any:
    """Call `kind.from_pretrained` for a model folder or repository name, with errors of one line."""
    check_model_name(str(path))
    if Path(path).exists() and not (Path(path) / "config.json").exists():
        raise UserError(f"{path} is neither a run, a checkpoint nor a model folder: it has no config.json")
    try:
        return from_pretrained(kind, str(path), **options)
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(f"cannot load a tokenizer from {path}: {first_line(error)}") from error


def find_checkpoint(path: Path) -> Path | None:
    """Return the checkpoint at a path: the path itself, or the newest valid one of a run; None for anything else."""
    if (path / CHECKPOINT_FILE).exists():
        if problem := find_damage(path):
            raise UserError(f"checkpoint {path} is damaged: {problem}")
        return path
    for directory in (path, path / "checkpoints"):
        if (checkpoint := newest_checkpoint(directory)) is not None:
            return checkpoint
    return None


def tokenizer_config(node: Mapping[str, Any]) -> MossAudioTokenizerConfig:
    """Return the configuration from the released keys or from five numbers per stage, as runs store it."""
    if "stages" in node:
        return MossAudioTokenizerConfig.from_stages(**node)
    return MossAudioTokenizerConfig(**node)


STATE_FOLDER = "training_state"
STATE_FILE = "networks.json"
FORMAT = {"format": "moss_train training state", "version": 1}


def write_training_state(folder: Path, nodes: Mapping[str, Any], weights: Weights) -> None:
    """Write networks into a new folder, with everything they need: nothing points to files outside it.

    Args:
        nodes: by name, the configuration (a node, or a list of nodes) that builds a network.
        weights: of these networks.
    """
    from moss_train.semantic import make_portable  # imported here, because encode and decode need no LM

    folder.mkdir(parents=True)
    records = {}
    for name, node in nodes.items():
        # Every tensor is stored once, with its further names: an output layer may be tied to an embedding.
        unique: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        first_names: dict[tuple, str] = {}
        for own_name, tensor in weights[name].items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if place in first_names and tensor.numel():
                aliases[own_name] = first_names[place]
            else:
                first_names[place] = own_name
                unique[own_name] = tensor.contiguous()
        # Not save_file: the file it makes cannot be read by other users.
        (folder / f"{name}.safetensors").write_bytes(save(unique))
        portable = make_portable(node, folder / "text") if name == "semantic" else node
        records[name] = {"node": portable, "file": f"{name}.safetensors", "aliases": aliases}
    (folder / STATE_FILE).write_text(json.dumps({**FORMAT, "networks": records}, indent=1) + "\n")


def read_training_state(folder: Path) -> tuple[dict[str, Any], Weights]:
    """Return the nodes and weights of a folder that `write_training_state` made.

    Raises:
        UserError: the folder is damaged or of another version.
    """
    from moss_train.semantic import with_local_text

    try:
        state = read_json(folder / STATE_FILE)
        if {key: state[key] for key in FORMAT} != FORMAT:
            raise UserError(f"{folder / STATE_FILE} is not a training state of version {FORMAT['version']}")
        nodes, weights = {}, {}
        for name, record in state["networks"].items():
            nodes[name] = with_local_text(record["node"], folder / "text") if name == "semantic" else record["node"]
            found = load_file(folder / Path(record["file"]).name)
            weights[name] = found | {alias: found[origin] for alias, origin in record["aliases"].items()}
        return nodes, weights
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"the training state in {folder} is damaged ({reason}); export it again") from error
