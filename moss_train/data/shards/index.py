"""The index of a packed folder: shards with counts, bytes and hashes, and the location of every clip."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moss_train.audio.io import RESAMPLER
from moss_train.data.shards.format import DOMAIN_PATTERN, FORMAT_VERSION, LATER_ARRAYS, SAMPLE_ARRAYS, ShardContents
from moss_train.data.shards.remote import fetch_arrays, fetch_index, is_remote, open_shard
from moss_train.utils.errors import UserError
from moss_train.utils.files import read_json, sha256_of

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.tar")


@dataclass(frozen=True)
class ShardRecord:
    """The index entry of one shard."""

    file: str
    domain: str
    num_clips: int
    bytes: int
    sha256: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the record as in index.json, where the number of clips is called `num_samples`."""
        return {"num_samples" if name == "num_clips" else name: value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], place: Path) -> "ShardRecord":
        """Parse a record of the index file `place`.

        Raises TypeError if it is not a mapping or has other keys, UserError for invalid values.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a record of a shard is {type(values).__name__}, no mapping")
        record = cls(**{"num_clips" if name == "num_samples" else name: value for name, value in values.items()})
        names = (record.file, record.domain, record.sha256)
        numbers = (record.num_clips, record.bytes)
        if not all(isinstance(name, str) for name in names) or not all(
            isinstance(number, int) and 0 <= number < 2**62 for number in numbers
        ):
            raise UserError(f"{place}: {record} is not the record of a shard; pack it again")
        if not _SHARD_NAME.fullmatch(record.file) or not DOMAIN_PATTERN.fullmatch(record.domain):
            raise UserError(f"{place}: shard {record.file!r} is not the plain name of a .tar file of a domain")
        if not re.fullmatch("[0-9a-f]{64}", record.sha256):
            raise UserError(f"{place}: {record.sha256!r} is not the hash of a shard; pack it again")
        return record


class ShardTable:
    """Records of shards, in the order of the index; S shards."""

    def __init__(self, records: Iterable[Mapping[str, Any]], place: Path) -> None:
        """Parse the records of the index file `place`. Raises UserError for one that is invalid or listed twice."""
        rows = [ShardRecord.from_json(record, place) for record in records]
        if len({row.file for row in rows}) < len(rows):
            counts = Counter(row.file for row in rows)
            raise UserError(f"{place}: shard {counts.most_common(1)[0][0]} is listed twice")
        self._files = np.array([row.file for row in rows], dtype=np.bytes_)
        self._hashes = np.array([row.sha256 for row in rows], dtype=np.bytes_)
        self.domains = tuple(sorted({row.domain for row in rows}))
        numbers = {domain: number for number, domain in enumerate(self.domains)}
        self.domain_numbers = np.array([numbers[row.domain] for row in rows], np.int32)  # [S], places in `domains`
        self.counts = np.array([row.num_clips for row in rows], np.int64)  # [S] clips
        self.sizes = np.array([row.bytes for row in rows], np.int64)  # [S] bytes
        self.seconds = np.array([row.seconds for row in rows], np.float64)  # [S]
        self.first_rows = np.concatenate([[0], np.cumsum(self.counts)])  # [S + 1] first row of every shard, and the end

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, number: int) -> ShardRecord:
        return ShardRecord(
            file=self._files[number].decode(),
            domain=self.domains[self.domain_numbers[number]],
            num_clips=int(self.counts[number]),
            bytes=int(self.sizes[number]),
            sha256=self._hashes[number].decode(),
            seconds=float(self.seconds[number]),
        )

    def __iter__(self) -> Iterator[ShardRecord]:
        return (self[number] for number in range(len(self)))

    def rows_of(self, number: int) -> range:
        """Return the rows of the clips of one shard."""
        return range(int(self.first_rows[number]), int(self.first_rows[number + 1]))

    def shard_of(self, row: int) -> int:
        """Return the number of the shard that holds the clip of one row."""
        return int(np.searchsorted(self.first_rows, row, side="right")) - 1

    def runs_of(self, domain: str) -> Iterator[tuple[int, int]]:
        """Yield the rows (first, last + 1) of every sequence of adjacent shards of one domain."""
        if domain in self.domains:
            inside = self.domain_numbers == self.domains.index(domain)
            edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]])))
            yield from map(tuple, self.first_rows[edges].reshape(-1, 2).tolist())


INDEX_FILE = "index.json"
ARRAYS_FILE = "index.safetensors"
FORMAT = "moss_train shards"

CHECKED_AT_LOAD = 2000
"""The sizes of at most this many shards, evenly spaced, are checked when a folder is loaded; the others when read."""


@dataclass(frozen=True)
class ClipLocation:
    """Where one clip lies in its shard, and what the index says about both."""

    shard: str  # path of the tar
    audio_offset: int
    audio_size: int
    json_offset: int
    json_size: int
    num_samples: int
    has_text: bool
    shard_bytes: int
    shard_sha256: str
    json_crc32: int | None = None  # None for folders of earlier versions


def write_index(
    folder: Path,
    header: Mapping[str, Any],
    records: Sequence[ShardRecord],
    arrays: Mapping[str, np.ndarray],
    more: Mapping[str, Any],
) -> dict:
    """Write the arrays and index.json of a folder of shards, and return the content of index.json."""
    # Not save_file, which makes a file that other users cannot read.
    (folder / ARRAYS_FILE).write_bytes(save({name: torch.from_numpy(array) for name, array in arrays.items()}))
    index = {
        **header,
        "num_samples": sum(record.num_clips for record in records),
        "arrays_sha256": sha256_of(folder / ARRAYS_FILE),
        **more,
        "shards": [record.to_json() for record in records],
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return index


class IndexBuilder:
    """Collects finished shards, in any order, and writes the index of all of them, in the order of their names."""

    def __init__(self, sampling_rate: int, num_channels: int) -> None:
        self._sampling_rate = sampling_rate
        self._num_channels = num_channels
        self._shards: dict[str, tuple[ShardRecord, dict[str, np.ndarray]]] = {}
        self._totals: dict[str, dict[str, Counter]] = {"domain": {}, "language": {}, "task": {}, "licence": {}}

    def add(self, file: str, domain: str, contents: ShardContents) -> None:
        """Add one finished shard."""
        lengths = contents.arrays["num_samples"]
        seconds = int(lengths.sum()) / self._sampling_rate
        record = ShardRecord(file, domain, len(lengths), contents.num_bytes, contents.sha256, seconds)
        self._shards[file] = (record, contents.arrays)
        for label in contents.labels:
            for kind, groups in self._totals.items():
                group = groups.setdefault(label.get(kind, "none"), Counter())
                group.update(clips=1, with_text=int("text" in label), samples=label["num_samples"])

    def write(self, folder: Path) -> dict:
        """Write both index files into `folder` and return the content of index.json."""
        shards = [self._shards[file] for file in sorted(self._shards)]
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "sampling_rate": self._sampling_rate,
            "num_channels": self._num_channels,
            "resampler": RESAMPLER,
        }
        arrays = {name: np.concatenate([parts[name] for _, parts in shards]) for name in SAMPLE_ARRAYS}
        hour = 3600 * self._sampling_rate
        totals = {  # clips without a label count as 'none'; licences are left out if no clip states one
            kind: {
                name: {"clips": group["clips"], "with_text": group["with_text"], "hours": group["samples"] / hour}
                for name, group in sorted(groups.items())
            }
            for kind, groups in self._totals.items()
            if kind != "licence" or set(groups) - {"none"}
        }
        return write_index(folder, header, [record for record, _ in shards], arrays, {"totals": totals})


class ShardIndex:
    """A folder of shards with its index, which is checked when it is loaded; each row is a clip."""

    def __init__(self, folder: Path, index: dict, arrays: Mapping[str, np.ndarray], url: str | None = None) -> None:
        self.folder = folder
        self.url = url  # where the shards are if they are not in `folder`
        self.sampling_rate: int = index["sampling_rate"]
        self.num_channels: int = index["num_channels"]
        self.shards = ShardTable(index["shards"], folder / INDEX_FILE)
        self.arrays = arrays  # as SAMPLE_ARRAYS, each [rows]; those of LATER_ARRAYS may be missing

    @classmethod
    def load(cls, folder: str | Path) -> "ShardIndex":
        """Load the index of a folder; the arrays stay on disk until they are used.

        Raises UserError if the folder is not packed, or if the index is damaged or does not match the shards' sizes.
        """
        url = str(folder) if is_remote(folder) else None
        folder = fetch_index(url, INDEX_FILE) if url else Path(folder)
        index = read_index(folder)
        try:
            path = fetch_arrays(url, ARRAYS_FILE, index["arrays_sha256"]) if url else folder / ARRAYS_FILE
            with safe_open(path, "pt") as file:
                missing = LATER_ARRAYS - set(file.keys())
                arrays = {name: file.get_tensor(name).numpy() for name in SAMPLE_ARRAYS if name not in missing}
            loaded = cls(folder, index, arrays, url)
        except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the index of {folder} is damaged ({error}); pack it again") from error
        shards, rows = loaded.shards, (int(loaded.shards.first_rows[-1]),)
        if any(array.shape != rows or array.dtype != SAMPLE_ARRAYS[name] for name, array in arrays.items()):
            raise UserError(f"the index of {folder} is damaged: {ARRAYS_FILE} does not fit {INDEX_FILE}; pack it again")
        if url is None:
            for number in range(0, len(shards), math.ceil(len(shards) / CHECKED_AT_LOAD) or 1):
                check_size(folder / shards[number].file, shards[number].bytes)
        return loaded

    def __len__(self) -> int:
        return len(self.arrays["num_samples"])

    def verify(self) -> None:
        """Compare every byte of the arrays and of every shard with the hashes of the index. Raises UserError."""
        self.verify_arrays()
        for shard in self.shards:
            self.verify_shard(shard)

    def verify_arrays(self) -> None:
        """Compare the arrays of a local folder with their hash. Raises UserError."""
        path = self.folder / ARRAYS_FILE
        if self.url is None and sha256_of(path) != read_index(self.folder)["arrays_sha256"]:
            raise UserError(f"{path} is damaged: its hash differs from the index")

    def verify_shard(self, shard: ShardRecord) -> None:
        """Compare every byte of one shard with its hash. Raises UserError."""
        if self.url is not None:
            os.close(open_shard(self._place(shard.file), shard.bytes, shard.sha256))  # checks the hash when it fetches
            return
        check_size(self.folder / shard.file, shard.bytes)
        if sha256_of(self.folder / shard.file) != shard.sha256:
            raise UserError(
                f"{self.folder / shard.file} is damaged: its hash differs from the index; copy or pack it again"
            )

    def locate(self, row: int) -> ClipLocation:
        """Return where the clip of one row lies."""
        values = {name: array[row].item() for name, array in self.arrays.items()}
        shard = self.shards[self.shards.shard_of(row)]
        return ClipLocation(shard=self._place(shard.file), shard_bytes=shard.bytes, shard_sha256=shard.sha256, **values)

    def _place(self, file: str) -> str:
        return str(self.folder / file) if self.url is None else f"{self.url.rstrip('/')}/{file}"


def check_size(path: Path, num_bytes: int) -> None:
    """Compare a file's size with the one in its index. Raises UserError."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} is in the index but cannot be read: {error.strerror}") from error
    if found != num_bytes:
        raise UserError(f"{path} has {found} bytes, its index says {num_bytes}; copy or pack it again")


def read_index(folder: Path) -> dict:
    """Return the content of a folder's index.json. Raises UserError when it is missing, damaged or of another
    version.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a folder of packed shards (no {INDEX_FILE}); make one with `moss_train pack`")
    try:
        index = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); pack it again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{path} is not an index of moss_train shards")
    if index.get("version") != FORMAT_VERSION:
        raise UserError(f"{path} has format version {index.get('version')}, this version reads {FORMAT_VERSION}")
    return index
