"""Codes of one clip as a file: the codes, and what is needed to turn them back into the clip.

A safetensors file holds a tensor `codes` and its metadata; an npz file, for numpy alone, holds arrays `codes` and one
for each field of the metadata.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from moss_train.utils.errors import UserError
from moss_train.utils.files import written_whole

CODES_FORMATS = ("safetensors", "npz")


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
    """Write codes [N, frames], as int16 where they fit, with `info`, in the format of the suffix; complete or not."""
    small = codes.numel() == 0 or int(codes.max()) < 2**15
    tensor = codes.detach().cpu().to(torch.int16 if small else torch.int64).contiguous()
    with written_whole(path) as temporary:
        if path.suffix == ".npz":
            np.savez(temporary, codes=tensor.numpy(), **asdict(info))
        else:
            metadata = {key: str(value) for key, value in asdict(info).items()}
            # Not save_file: the file it makes cannot be read by other users, and a full disk is no OSError.
            temporary.write_bytes(save({"codes": tensor}, metadata))


def read_codes(path: Path) -> tuple[Tensor, CodesInfo]:
    """Read codes [N, frames] as int64 with their metadata. Raises UserError when `path` is not a codes file."""
    if path.suffix == ".npz":
        arrays = _read_npz(path)
        codes, metadata = arrays.pop("codes"), arrays
        if not np.issubdtype(codes.dtype, np.integer):
            raise UserError(f"{path} holds codes of type {codes.dtype}, not integers")
        tensor = torch.from_numpy(codes.astype(np.int64))
    else:
        with _open(path) as file:
            tensor, metadata = file.get_tensor("codes").to(torch.int64), file.metadata()
    _check_shape(path, tuple(tensor.shape))
    return tensor, _info(path, metadata)


def read_codes_header(path: Path) -> tuple[tuple[int, int], CodesInfo]:
    """Read the shape (N, frames) and the metadata, as `read_codes` does; without the codes where the format allows."""
    if path.suffix == ".npz":
        codes, info = read_codes(path)
        return (codes.shape[0], codes.shape[1]), info
    with _open(path) as file:
        shape = tuple(file.get_slice("codes").get_shape())
        _check_shape(path, shape)
        return shape, _info(path, file.metadata())


def _check_shape(path: Path, shape: tuple[int, ...]) -> None:
    if len(shape) != 2:
        raise UserError(f"{path} holds codes of shape {shape}, not [levels, frames]")


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} is not a readable codes file ({error})") from error
    if "codes" not in arrays:
        raise UserError(f"{path} is an npz file without codes; give files that encode wrote")
    return arrays


def _open(path: Path) -> "safetensors.safe_open":
    try:
        file = safetensors.safe_open(path, framework="pt")
        names = list(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable codes file ({error})") from error
    if "codes" not in names:
        raise UserError(f"{path} is a safetensors file without codes; give files that encode wrote")
    return file


def _info(path: Path, metadata: Mapping[str, Any] | None) -> CodesInfo:
    try:
        return CodesInfo(
            **{field.name: cast(Any, field.type)((metadata or {})[field.name]) for field in fields(CodesInfo)}
        )
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} lacks the metadata of a codes file ({error}); encode the audio again") from error
