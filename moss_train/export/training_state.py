"""The text LM and the discriminators beside an export, so that others can continue training it.

`training_state/networks.json` describes how each network is built, `<name>.safetensors` holds its weights. Loaders of
the model itself do not look there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from moss_train.semantic.text_encoder import make_portable, with_local_text
from moss_train.utils.errors import UserError
from moss_train.utils.files import read_json

STATE_FOLDER = "training_state"
STATE_FILE = "networks.json"
FORMAT = {"format": "moss_train training state", "version": 1}


@dataclass(frozen=True)
class Network:
    """A network of the training: the configuration (a node, or a list of nodes) that builds it, and its weights."""

    node: Any
    weights: Mapping[str, Tensor]


def write_training_state(folder: Path, networks: Mapping[str, Network]) -> None:
    """Write networks into a new folder, with everything they need: nothing points to files outside it."""
    folder.mkdir(parents=True)
    records = {}
    for name, network in networks.items():
        node = make_portable(network.node, folder / "text") if name == "semantic" else network.node
        unique, aliases = without_aliases(network.weights)
        # Not save_file: the file it makes cannot be read by other users.
        (folder / f"{name}.safetensors").write_bytes(save(unique))
        records[name] = {"node": node, "file": f"{name}.safetensors", "aliases": aliases}
    (folder / STATE_FILE).write_text(json.dumps({**FORMAT, "networks": records}, indent=1) + "\n")


def read_training_state(folder: Path) -> dict[str, Network]:
    """The networks of a folder that `write_training_state` made.

    Raises:
        UserError: the folder is damaged or of another version.
    """
    try:
        state = read_json(folder / STATE_FILE)
        if {key: state[key] for key in FORMAT} != FORMAT:
            raise UserError(f"{folder / STATE_FILE} is not a training state of version {FORMAT['version']}")
        networks = {}
        for name, record in state["networks"].items():
            weights = load_file(folder / Path(record["file"]).name)
            weights |= {alias: weights[origin] for alias, origin in record["aliases"].items()}
            node = with_local_text(record["node"], folder / "text") if name == "semantic" else record["node"]
            networks[name] = Network(node, weights)
        return networks
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"the training state in {folder} is damaged ({reason}); export it again") from error


def without_aliases(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, and which further names it has: an output layer tied to its embedding, for one."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple, str] = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if place in names and tensor.numel():
            aliases[name] = names[place]
        else:
            names[place] = name
            unique[name] = tensor.contiguous()
    return unique, aliases
