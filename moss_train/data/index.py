"""The index beside a folder of shards: where every sample lies, so that samples are read by seek and none gets lost."""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moss_train.audio import RESAMPLER
from moss_train.data.manifest import DOMAIN_PATTERN
from moss_train.data.remote import fetch_index, fetch_shard, is_remote
from moss_train.data.shards import FORMAT_VERSION, SAMPLE_ARRAYS, ShardContents, sha256_of
from moss_train.utils.errors import UserError

INDEX_FILE = "index.json"
ARRAYS_FILE = "index.safetensors"
FORMAT = "moss_train shards"

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.tar")


@dataclass(frozen=True)
class ShardRecord:
    """One shard as the index describes it."""

    file: str
    domain: str
    num_samples: int  # clips
    bytes: int
    sha256: str
    seconds: float


@dataclass(frozen=True)
class ClipLocation:
    """Where one clip lies, and how long it has to be."""

    shard: str  # path of the tar
    audio_offset: int
    audio_size: int
    json_offset: int
    json_size: int
    num_samples: int
    has_text: bool


class IndexBuilder:
    """Collects finished shards, in any order, and writes the index of all of them, in the order of their names."""

    def __init__(self, sampling_rate: int, num_channels: int) -> None:
        self._sampling_rate = sampling_rate
        self._num_channels = num_channels
        self._shards: dict[str, tuple[ShardRecord, dict[str, np.ndarray]]] = {}
        self._totals: dict[str, dict[str, Counter]] = {"domain": {}, "language": {}, "task": {}}

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
        counts = [record.num_samples for record, _ in shards]
        arrays = {name: np.concatenate([parts[name] for _, parts in shards]) for name in SAMPLE_ARRAYS}
        arrays["shard"] = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        # Not save_file: the file it makes cannot be read by other users.
        (folder / ARRAYS_FILE).write_bytes(save({name: torch.from_numpy(array) for name, array in arrays.items()}))
        index = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "sampling_rate": self._sampling_rate,
            "num_channels": self._num_channels,
            "resampler": RESAMPLER,
            "num_samples": sum(counts),
            "arrays_sha256": sha256_of(folder / ARRAYS_FILE),
            "totals": self._sum_up(),
            "shards": [asdict(record) for record, _ in shards],
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return index

    def _sum_up(self) -> dict:
        """Clips, clips with text and hours by domain, language and task; clips without a label count as 'none'."""
        hour = 3600 * self._sampling_rate
        return {
            kind: {
                name: {"clips": group["clips"], "with_text": group["with_text"], "hours": group["samples"] / hour}
                for name, group in sorted(groups.items())
            }
            for kind, groups in self._totals.items()
        }


class ShardIndex:
    """A folder of shards with its index, checked when it is loaded."""

    def __init__(self, folder: Path, index: dict, arrays: dict[str, np.ndarray]) -> None:
        self.folder = folder
        self.sampling_rate: int = index["sampling_rate"]
        self.num_channels: int = index["num_channels"]
        self.shards = tuple(ShardRecord(**record) for record in index["shards"])
        self.arrays = arrays
        self.url: str | None = None  # where the shards lie, when they are not in `folder`
        self._arrays_sha256 = index["arrays_sha256"]

    @classmethod
    def load(cls, folder: str | Path) -> "ShardIndex":
        """Load the index of a folder; the arrays stay on the disk until they are used.

        Raises UserError when the folder is not packed, the index is damaged or does not fit the shards' sizes.
        """
        url = str(folder) if is_remote(folder) else None
        folder = fetch_index(url, (INDEX_FILE, ARRAYS_FILE)) if url else Path(folder)
        index = _read_json(folder)
        try:
            with safe_open(folder / ARRAYS_FILE, "pt") as file:
                arrays = {name: file.get_tensor(name).numpy() for name in (*SAMPLE_ARRAYS, "shard")}
            loaded = cls(folder, index, arrays)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise UserError(f"the index of {folder} is damaged ({error}); pack it again") from error
        loaded.url = url
        loaded.verify(full=False)
        return loaded

    def __len__(self) -> int:
        return len(self.arrays["num_samples"])

    def verify(self, *, full: bool = True) -> None:
        """Compare the files on disk with the index: sizes, and with `full` every byte. Raises UserError."""
        counts = np.bincount(self.arrays["shard"], minlength=len(self.shards))
        if counts.tolist() != [shard.num_samples for shard in self.shards] or (np.diff(self.arrays["shard"]) < 0).any():
            raise UserError(
                f"the index of {self.folder} is damaged: {ARRAYS_FILE} does not fit {INDEX_FILE}; pack it again"
            )
        if full and sha256_of(self.folder / ARRAYS_FILE) != self._arrays_sha256:
            raise UserError(f"{self.folder / ARRAYS_FILE} is damaged: its hash differs from the index")
        for shard in self.shards:
            self.verify_shard(shard, full=full)

    def verify_shard(self, shard: ShardRecord, *, full: bool = True) -> None:
        """Compare one shard on disk with its record, as `verify` does."""
        if not _SHARD_NAME.fullmatch(shard.file) or not DOMAIN_PATTERN.fullmatch(shard.domain):
            raise UserError(
                f"{self.folder / INDEX_FILE}: shard {shard.file!r} is not the plain name of a .tar file of a domain"
            )
        if self.url is not None and not full:
            return  # compared when it is fetched
        path = self.folder / shard.file if self.url is None else fetch_shard(self._place(shard))
        try:
            num_bytes = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path} is in the index but cannot be read: {error.strerror}") from error
        if num_bytes != shard.bytes:
            raise UserError(f"{path} has {num_bytes} bytes, its index says {shard.bytes}; copy or pack it again")
        if full and sha256_of(path) != shard.sha256:
            raise UserError(f"{path} is damaged: its hash differs from the index; copy or pack it again")

    def locate(self, row: int) -> ClipLocation:
        """Where the clip of one row lies."""
        values = {name: self.arrays[name][row].item() for name in SAMPLE_ARRAYS}
        return ClipLocation(shard=self._place(self.shards[self.arrays["shard"][row]]), **values)

    def _place(self, shard: ShardRecord) -> str:
        return str(self.folder / shard.file) if self.url is None else f"{self.url.rstrip('/')}/{shard.file}"


def _read_json(folder: Path) -> dict:
    path = folder / INDEX_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a folder of packed shards (no {INDEX_FILE}); make one with `moss_train pack`")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); pack it again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{path} is not an index of moss_train shards")
    if index.get("version") != FORMAT_VERSION:
        raise UserError(f"{path} has format version {index.get('version')}, this version reads {FORMAT_VERSION}")
    return index
