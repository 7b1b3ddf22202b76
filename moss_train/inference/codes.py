"""Codes of one clip as a safetensors file: the codes, and what is needed to turn them back into the clip."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from moss_train.utils.errors import UserError
from moss_train.utils.files import written_whole

CODES_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class CodesInfo:
    """The metadata of a codes file."""

    model: str  # where the model came from, as it was named
    sampling_rate: int  # Hz, of the waveform that the codes stand for
    frame_rate: float  # Hz
    num_channels: int
    num_samples: int  # per channel, before padding to whole frames
    fingerprint: str  # of the encoder and quantizer weights; equal fingerprints make equal codes


def write_codes(path: Path, codes: Tensor, info: CodesInfo) -> None:
    """Write codes [N, frames], as int16 where they fit, with `info` as metadata; complete or not at all."""
    small = codes.numel() == 0 or int(codes.max()) < 2**15
    tensor = codes.detach().cpu().to(torch.int16 if small else torch.int64).contiguous()
    with written_whole(path) as temporary:
        save_file({"codes": tensor}, temporary, metadata={key: str(value) for key, value in asdict(info).items()})


def read_codes(path: Path) -> tuple[Tensor, CodesInfo]:
    """Read codes [N, frames] as int64 with their metadata. Raises UserError when `path` is not a codes file."""
    with _open(path) as file:
        codes = file.get_tensor("codes").to(torch.int64)
        if codes.ndim != 2:
            raise UserError(f"{path} holds codes of shape {tuple(codes.shape)}, not [levels, frames]")
        return codes, _info(path, file.metadata())


def read_codes_header(path: Path) -> tuple[tuple[int, int], CodesInfo]:
    """Read the shape (N, frames) and the metadata without the codes. Raises UserError as `read_codes` does."""
    with _open(path) as file:
        shape = tuple(file.get_slice("codes").get_shape())
        if len(shape) != 2:
            raise UserError(f"{path} holds codes of shape {shape}, not [levels, frames]")
        return shape, _info(path, file.metadata())


def _open(path: Path) -> "safetensors.safe_open":
    try:
        file = safetensors.safe_open(path, framework="pt")
        names = list(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable codes file ({error})") from error
    if "codes" not in names:
        raise UserError(f"{path} is a safetensors file without codes; give files that encode wrote")
    return file


def _info(path: Path, metadata: dict[str, str] | None) -> CodesInfo:
    types: dict[str, Callable[[str], Any]] = {
        "model": str,
        "sampling_rate": int,
        "frame_rate": float,
        "num_channels": int,
        "num_samples": int,
    }
    types["fingerprint"] = str
    try:
        return CodesInfo(**{key: convert((metadata or {})[key]) for key, convert in types.items()})
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} lacks the metadata of a codes file ({error}); encode the audio again") from error
