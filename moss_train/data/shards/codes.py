"""Shards of codes: tars like those of `pack`, with `<key>.npy` in place of the audio, and the same kind of index."""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from webdataset import TarWriter

from moss_train.data.shards.index import ARRAYS_FILE, INDEX_FILE, ShardRecord, ShardTable, check_size, write_index
from moss_train.utils.errors import UserError
from moss_train.utils.files import atomic_write, parse_json, read_json, sha256_of

CODES_FORMAT = "moss_train codes"
CODES_VERSION = 1

CODE_ARRAYS = {
    "num_samples": np.dtype(np.int64),  # of the audio, per channel
    "num_frames": np.dtype(np.int64),
    "has_text": np.dtype(np.bool_),
    "codes_offset": np.dtype(np.int64),  # bytes from the start of the tar
    "codes_size": np.dtype(np.int64),
    "json_offset": np.dtype(np.int64),
    "json_size": np.dtype(np.int64),
    "shard": np.dtype(np.int32),
}


@dataclass(frozen=True)
class CodesSource:
    """What the codes were made with; equal values give equal codes."""

    model: str  # path or name of the model, as the user gave it
    fingerprint: str  # of the encoder and quantizer weights
    num_levels: int
    sampling_rate: int  # Hz, of the waveforms
    frame_rate: float  # Hz
    num_channels: int
    audio_sha256: str  # of the arrays in the index of the audio shards


@dataclass(frozen=True)
class CodedClip:
    """One clip of a code shard."""

    key: str
    codes: Tensor  # [N, frames] int64
    labels: dict  # the JSON of the audio clip: id, num_samples, sampling_rate, text ...


def write_code_shard(path: Path, clips: list[CodedClip]) -> None:
    """Write a shard, complete or not at all; the same clips give the same bytes."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        tar = TarWriter(file, compress=False, encoder=False, mtime=0, user="", group="")
        for clip in clips:
            text = json.dumps(clip.labels, ensure_ascii=False, sort_keys=True).encode()
            small = clip.codes.numel() == 0 or int(clip.codes.max()) < 2**15
            codes = io.BytesIO()
            np.save(codes, clip.codes.to(torch.int16 if small else torch.int32).numpy(), allow_pickle=False)
            tar.write({"__key__": clip.key, "json": text, "npy": codes.getvalue()})
        tar.close()
        file.flush()
        os.fsync(file.fileno())


def write_code_index(folder: Path, shards: list[tuple[str, str]], source: CodesSource) -> dict:
    """Index finished shards, given as (file, domain), by reading them, and return the content of index.json."""
    records, parts = [], []
    for number, (file, domain) in enumerate(shards):
        rows = []
        with tarfile.open(folder / file, "r:") as tar:
            members = list(tar)
            for text, codes in zip(members[::2], members[1::2], strict=True):
                content, array = tar.extractfile(text), tar.extractfile(codes)
                assert content is not None, text.name
                assert array is not None, codes.name
                labels = parse_json(content.read(), text.name)
                num_frames = np.load(io.BytesIO(array.read()), allow_pickle=False).shape[1]
                places = (codes.offset_data, codes.size, text.offset_data, text.size)
                rows.append((labels["num_samples"], num_frames, "text" in labels, *places, number))
        parts.append(np.array(rows, list(CODE_ARRAYS.items())))
        seconds = int(parts[-1]["num_samples"].sum()) / source.sampling_rate
        size = (folder / file).stat().st_size
        records.append(ShardRecord(file, domain, len(rows), size, sha256_of(folder / file), seconds))
    table = np.concatenate(parts)
    columns = {name: table[name].copy() for name in CODE_ARRAYS}
    header = {"format": CODES_FORMAT, "version": CODES_VERSION, "source": asdict(source)}
    return write_index(folder, header, records, columns, {})


def is_code_folder(folder: Path) -> bool:
    """Return whether `encode shards=` wrote the folder."""
    try:
        return read_json(folder / INDEX_FILE).get("format") == CODES_FORMAT
    except (OSError, ValueError, AttributeError):
        return False


class CodeShards:
    """A folder of code shards with its index; each row is a clip."""

    def __init__(self, folder: str | Path) -> None:
        """Load and check the index. Raises UserError if it is damaged or does not match the shards' sizes."""
        self.folder = Path(folder)
        try:
            index = read_json(self.folder / INDEX_FILE)
            if (index["format"], index["version"]) != (CODES_FORMAT, CODES_VERSION):
                raise UserError(f"{self.folder} is not a folder of codes of this version; encode the shards again")
            self.source = CodesSource(**index["source"])
            self.shards = ShardTable(index["shards"], self.folder / INDEX_FILE)
            with safe_open(self.folder / ARRAYS_FILE, "pt") as file:
                self.arrays = {name: file.get_tensor(name).numpy() for name in CODE_ARRAYS}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the index of {self.folder} is damaged ({error}); encode the shards again") from error
        arrays, numbers = self.arrays, self.arrays["shard"]
        fits = numbers.ndim == 1 and all(
            array.shape == numbers.shape and array.dtype == CODE_ARRAYS[name] for name, array in arrays.items()
        )
        if fits and len(numbers):
            fits = numbers.min() >= 0 and numbers.max() < len(self.shards)
        if fits:  # every clip has to lie inside its shard, so that file sizes bound what is read
            sizes = self.shards.sizes[numbers]
            places = [arrays[f"{part}_{value}"] for part in ("codes", "json") for value in ("offset", "size")]
            fits = all(bool(((place >= 0) & (place <= sizes)).all()) for place in places)
        if not fits:
            raise UserError(
                f"the index of {self.folder} is damaged: {ARRAYS_FILE} does not fit; encode the shards again"
            )
        for shard in self.shards:
            check_size(self.folder / shard.file, shard.bytes)

    def __len__(self) -> int:
        return len(self.arrays["num_samples"])

    def verify(self) -> None:
        """Compare every byte with the hashes of the index. Raises UserError."""
        for shard in self.shards:
            if sha256_of(self.folder / shard.file) != shard.sha256:
                raise UserError(f"{self.folder / shard.file} is damaged: its hash differs from the index")

    def labels(self, row: int) -> dict:
        """Read the JSON of one clip. Raises UserError."""
        with self._open_clip(row) as (file, path):
            file.seek(int(self.arrays["json_offset"][row]))
            return parse_json(file.read(int(self.arrays["json_size"][row])), str(path))

    def read(self, row: int) -> tuple[Tensor, dict]:
        """Read the codes [N, frames] int64 and the JSON of one clip. Raises UserError."""
        with self._open_clip(row) as (file, path):
            file.seek(int(self.arrays["codes_offset"][row]))
            content = io.BytesIO(file.read(int(self.arrays["codes_size"][row])))
            # Not np.load, which would also unpack a zip file.
            codes = np.lib.format.read_array(content, allow_pickle=False)
        if codes.shape != (self.source.num_levels, self.arrays["num_frames"][row]):
            raise UserError(f"{path}, clip {row}: codes of shape {codes.shape} do not fit the index")
        return torch.from_numpy(codes.astype(np.int64)), self.labels(row)

    @contextmanager
    def _open_clip(self, row: int) -> Iterator[tuple[BinaryIO, Path]]:
        """Open the shard of a clip; any error while it is read becomes a UserError."""
        path = self.folder / self.shards[int(self.arrays["shard"][row])].file
        try:
            with path.open("rb") as file:
                yield file, path
        except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:
            raise UserError(f"{path} is damaged at clip {row} ({error}); encode it again") from error

    def __iter__(self) -> Iterator[tuple[str, Tensor, dict]]:
        """Yield id, codes [N, frames] and JSON of every clip, in the order of the index."""
        for row in range(len(self)):
            codes, labels = self.read(row)
            yield labels["id"], codes, labels
