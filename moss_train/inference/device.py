"""The device that inference runs on."""

import torch

from moss_train.utils.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device of a name: `auto` is the first GPU when there is one, else the CPU. Raises UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name} is not a device: write auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name} is not there: torch sees {torch.cuda.device_count()} GPUs")
    return device
