"""Make a corpus of any size without audio: shard records are written and read like real ones, clips are computed.

Used by `simulate_cluster.py`. The length and the text flag of a clip are functions of its row, computed on demand, so
that a billion of them take no memory.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_train.data.shards.format import FORMAT_VERSION, SAMPLE_ARRAYS
from moss_train.data.shards.index import FORMAT, INDEX_FILE, ShardIndex, ShardRecord, read_index
from moss_train.data.stream.corpus import Corpus

RATE = 24000
BYTES_PER_SECOND = 26_000
"""Of FLAC at 24 kHz, 16 bits, mono; an estimate, it decides nothing here but the printed sizes."""

SHARDS_PER_FOLDER = 50_000
CLIPS_PER_SHARD = (800, 1200)


@dataclass(frozen=True)
class Domain:
    """One domain of the synthetic corpus."""

    name: str
    share_of_shards: float
    weight: float  # wanted share of the audio seconds
    seconds: tuple[float, float]  # shortest and longest clip
    share_with_text: float


DOMAINS = (
    Domain("music", 0.30, 0.25, (4.0, 25.0), 0.1),
    Domain("sound", 0.02, 0.15, (0.5, 20.0), 0.3),
    Domain("speech", 0.68, 0.60, (1.0, 18.0), 0.7),
)


class Computed:
    """A column of an index whose values are functions of the row."""

    def __init__(self, num_rows: int, first: int, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self._num_rows, self._first, self._function = num_rows, first, function

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, rows: slice | int | np.ndarray) -> Any:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(self._num_rows))
        values = self._function(_scrambled(np.asarray(rows) + self._first))
        return values if np.ndim(rows) else values[0]


def _scrambled(rows: np.ndarray) -> np.ndarray:
    """Return 32 pseudorandom bits for every row, by multiplication with the fractional part of the golden ratio."""
    return (np.atleast_1d(rows).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)


def columns_of(domain: Domain, num_rows: int, first: int) -> dict[str, Computed]:
    """Return the columns of a folder; `first` is the number of its first clip in the whole corpus."""
    shortest, longest = (round(seconds * RATE) for seconds in domain.seconds)

    def lengths(bits: np.ndarray) -> np.ndarray:
        return shortest + ((bits * np.uint64(longest - shortest)) >> np.uint64(32)).astype(np.int64)

    def has_text(bits: np.ndarray) -> np.ndarray:
        return (bits & np.uint64(0xFFF)) < np.uint64(4096 * domain.share_with_text)

    def zero(bits: np.ndarray) -> np.ndarray:
        return np.zeros(bits.shape, np.int64)

    functions = {"num_samples": lengths, "has_text": has_text}
    return {name: Computed(num_rows, first, functions.get(name, zero)) for name in SAMPLE_ARRAYS}


def write_indexes(folder: Path, num_shards: int) -> list[tuple[Path, Domain]]:
    """Write the index.json of every folder of a synthetic corpus."""
    folders = []
    for domain in DOMAINS:
        total = max(1, round(num_shards * domain.share_of_shards))
        for begin in range(0, total, SHARDS_PER_FOLDER):
            path = folder / f"{domain.name}-{begin}"
            path.mkdir()
            records = [record_of(domain, number) for number in range(begin, min(total, begin + SHARDS_PER_FOLDER))]
            index = {"format": FORMAT, "version": FORMAT_VERSION, "sampling_rate": RATE, "num_channels": 1}
            (path / INDEX_FILE).write_text(json.dumps(index | {"shards": records}))
            folders.append((path, domain))
    return folders


def record_of(domain: Domain, number: int) -> dict:
    """Return the record of one shard; its number of clips depends on the shard's number."""
    least, most = CLIPS_PER_SHARD
    count = least + int(_scrambled(np.int64(number))[0]) % (most - least + 1)
    seconds = count * sum(domain.seconds) / 2
    name = f"{domain.name}-{number:06d}.tar"
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return ShardRecord(name, domain.name, count, round(seconds * BYTES_PER_SECOND), sha256, seconds).to_json()


def load_corpus(folders: Sequence[tuple[Path, Domain]]) -> Corpus:
    """Read the indexes and return the corpus."""
    indexes, first = [], 0
    for path, domain in folders:
        index = read_index(path)
        num_rows = sum(shard["num_samples"] for shard in index["shards"])
        indexes.append(ShardIndex(path, index, columns_of(domain, num_rows, first), url="s3://synthetic"))
        first += num_rows
    return Corpus(indexes)
