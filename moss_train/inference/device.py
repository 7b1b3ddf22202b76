"""The device that inference runs on."""

import torch

from moss_train.model import MossAudioTokenizerModel
from moss_train.utils.errors import UserError

PRECISIONS = ("fp32", "bf16")


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


def use_precision(
    model: MossAudioTokenizerModel, precision: str | None, device: torch.device
) -> MossAudioTokenizerModel:
    """Return the model set to compute in "fp32" or "bf16"; None leaves what its configuration says.

    Weights, quantizer and spectra stay float32. Codes of the two precisions differ in a few places.

    Raises:
        UserError: another name, or bf16 on a GPU without it.
    """
    if precision is None:
        return model
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision} is not one of {', '.join(PRECISIONS)}, null")
    if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(f"precision=bf16: {torch.cuda.get_device_name(device)} computes in fp32 only")
    model.config.compute_dtype = precision
    return model


def precision_of(model: MossAudioTokenizerModel) -> str:
    """Return the name of what a model's encoder and decoder compute in: fp32, bf16 or fp16."""
    return getattr(model.config, "compute_dtype", None) or "fp32"


def with_precision(fingerprint: str, model: MossAudioTokenizerModel) -> str:
    """Return the fingerprint of a model's weights with its precision, unless that is float32: results differ too."""
    precision = precision_of(model)
    return fingerprint if precision == "fp32" else f"{fingerprint}-{precision}"
