"""The shards of a folder as columns: a million of them take some hundred bytes each, not a Python object each."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_train.data.manifest import DOMAIN_PATTERN
from moss_train.utils.errors import UserError

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


class ShardTable:
    """Records of shards, in the order of the index; S shards."""

    def __init__(self, records: Iterable[Mapping[str, Any]], place: Path) -> None:
        """Take the records of the index file `place`. Raises UserError for one that cannot be, or is there twice."""
        rows = [(_checked(ShardRecord(**record), place)) for record in records]
        if len({row.file for row in rows}) < len(rows):
            counts = Counter(row.file for row in rows)
            raise UserError(f"{place}: shard {counts.most_common(1)[0][0]} is listed twice")
        self._files = np.array([row.file for row in rows], dtype=np.bytes_)
        self._hashes = np.array([row.sha256 for row in rows], dtype=np.bytes_)
        self.domains = tuple(sorted({row.domain for row in rows}))
        numbers = {domain: number for number, domain in enumerate(self.domains)}
        self.domain_numbers = np.array([numbers[row.domain] for row in rows], np.int32)  # [S], places in `domains`
        self.counts = np.array([row.num_samples for row in rows], np.int64)  # [S] clips
        self.sizes = np.array([row.bytes for row in rows], np.int64)  # [S] bytes
        self.seconds = np.array([row.seconds for row in rows], np.float64)  # [S]
        self.first_rows = np.concatenate([[0], np.cumsum(self.counts)])  # [S + 1] first clip of every shard, and all

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, number: int) -> ShardRecord:
        return ShardRecord(
            file=self._files[number].decode(),
            domain=self.domains[self.domain_numbers[number]],
            num_samples=int(self.counts[number]),
            bytes=int(self.sizes[number]),
            sha256=self._hashes[number].decode(),
            seconds=float(self.seconds[number]),
        )

    def __iter__(self) -> Iterator[ShardRecord]:
        return (self[number] for number in range(len(self)))

    def rows_of(self, number: int) -> range:
        """Rows of the clips of one shard."""
        return range(int(self.first_rows[number]), int(self.first_rows[number + 1]))

    def shard_of(self, row: int) -> int:
        """Number of the shard with the clip of one row."""
        return int(np.searchsorted(self.first_rows, row, side="right")) - 1

    def runs_of(self, domain: str) -> Iterator[tuple[int, int]]:
        """Rows, first and last + 1, of every run of consecutive shards of one domain."""
        if domain in self.domains:
            inside = self.domain_numbers == self.domains.index(domain)
            edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]])))
            yield from map(tuple, self.first_rows[edges].reshape(-1, 2).tolist())


def _checked(record: ShardRecord, place: Path) -> ShardRecord:
    names = (record.file, record.domain, record.sha256)
    numbers = (record.num_samples, record.bytes)
    if not all(isinstance(name, str) for name in names) or not all(
        isinstance(number, int) and 0 <= number < 2**62 for number in numbers
    ):
        raise UserError(f"{place}: {record} is not the record of a shard; pack it again")
    if not _SHARD_NAME.fullmatch(record.file) or not DOMAIN_PATTERN.fullmatch(record.domain):
        raise UserError(f"{place}: shard {record.file!r} is not the plain name of a .tar file of a domain")
    return record
