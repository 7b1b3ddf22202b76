"""All packed folders of a run as one table of clips by domain, and the order in which each domain is read."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from moss_train.data.shards.format import SAMPLE_ARRAYS
from moss_train.data.shards.index import ClipLocation, ShardIndex
from moss_train.data.stream.order import permutation
from moss_train.utils.errors import UserError

STRETCH_ROWS = 2**20
"""So many clips are looked at together when all of them are measured."""


class Corpus:
    """Several packed folders seen as one table; a row is one clip."""

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        self._indexes = tuple(indexes)
        self._first_rows = np.cumsum([0] + [len(index) for index in self._indexes])

    @classmethod
    def load(cls, sources: Sequence[str | Path], *, sampling_rate: int, num_channels: int) -> "Corpus":
        """Load packed folders. Raises UserError when one does not have the wanted sampling rate or channels."""
        indexes = [ShardIndex.load(source) for source in sources]
        for index in indexes:
            _check_format(index, sampling_rate, num_channels)
        if not any(len(index) for index in indexes):
            raise UserError("no clips: give at least one folder made by `moss_train pack`")
        _warn_of_doubles(indexes)
        return cls(indexes)

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def column(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Values of one sample array for the given rows, in their order."""
        values = np.empty(len(rows), dtype=SAMPLE_ARRAYS[name])
        sources = np.searchsorted(self._first_rows, rows, side="right") - 1
        for source in np.unique(sources):
            inside = sources == source
            values[inside] = self._indexes[source].arrays[name][rows[inside] - self._first_rows[source]]
        return values

    def locate(self, row: int) -> ClipLocation:
        """Where the clip of one row lies."""
        source = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self._indexes[source].locate(row - int(self._first_rows[source]))

    def shard_ranges(self) -> dict[str, np.ndarray]:
        """For every domain, in alphabetical order, the rows of its shards: [shards, 2] first row and count."""
        ranges: dict[str, list[np.ndarray]] = {}
        for index, first in zip(self._indexes, self._first_rows[:-1], strict=True):
            shards = index.shards
            rows = np.stack([shards.first_rows[:-1] + first, shards.counts], axis=1)
            for number, domain in enumerate(shards.domains):
                ranges.setdefault(domain, []).append(rows[shards.domain_numbers == number])
        return {domain: np.concatenate(ranges[domain]) for domain in sorted(ranges)}

    def stretches(self, domain: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the lengths and the text flags of all clips of a domain, in pieces that fit into the memory."""
        for index in self._indexes:
            for begin, end in index.shards.runs_of(domain):
                for first in range(begin, end, STRETCH_ROWS):
                    piece = slice(first, min(end, first + STRETCH_ROWS))
                    lengths = index.arrays["num_samples"][piece]
                    if lengths.min() < 1:
                        raise UserError(f"the index of {index.folder} is damaged: clips without samples; pack it again")
                    yield lengths, index.arrays["has_text"][piece]


def _check_format(index: ShardIndex, sampling_rate: int, num_channels: int) -> None:
    wanted = {"sampling_rate": sampling_rate, "num_channels": num_channels}
    found = {"sampling_rate": index.sampling_rate, "num_channels": index.num_channels}
    if wanted != found:
        have = " ".join(f"{key}={value}" for key, value in found.items())
        need = " ".join(f"{key}={value}" for key, value in wanted.items())
        raise UserError(
            f"{index.folder} is packed with {have}, the model needs {need}; pack the audio again with {need}"
        )


def _warn_of_doubles(indexes: Sequence[ShardIndex]) -> None:
    places = Counter(index.url or str(index.folder.resolve()) for index in indexes)
    for place, count in places.items():
        if count > 1:
            warnings.warn(f"{place} is given {count} times, its clips are used {count} times as often", stacklevel=4)


class DomainOrder:
    """The endless order in which the clips of one domain are read: pass after pass, every clip once per pass.

    In each pass the shards are put in random order and the clips are shuffled within windows of consecutive shards, so
    reading stays local. Element n is computed without walking through the earlier ones.
    """

    def __init__(self, domain: str, shards: np.ndarray, *, seed: int, window_shards: int) -> None:
        self.domain = domain
        self.num_clips = int(shards[:, 1].sum())
        self._shards = shards  # [shards, 2] first row and count
        self._seed = seed
        self._window_shards = window_shards
        self._pass_layout = lru_cache(maxsize=2)(self._make_pass_layout)
        self._window_rows = lru_cache(maxsize=4)(self._make_window_rows)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows of the elements first, first + 1, ... as int64 [count]."""
        parts, element = [], first
        while element < first + count:
            number, place = divmod(element, self.num_clips)
            _, window_starts = self._pass_layout(number)
            window = int(np.searchsorted(window_starts, place, side="right")) - 1
            begin = place - int(window_starts[window])
            part = self._window_rows(number, window)[begin : begin + first + count - element]
            parts.append(part)
            element += len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _make_pass_layout(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard order of a pass, and the place in the pass at which each window of shards begins."""
        order = permutation(self._seed, f"shards of {self.domain}", number, count=len(self._shards))
        ends = np.cumsum(self._shards[order, 1])
        starts = ends - self._shards[order, 1]
        return order, starts[:: self._window_shards]

    def _make_window_rows(self, number: int, window: int) -> np.ndarray:
        order, _ = self._pass_layout(number)
        members = order[window * self._window_shards : (window + 1) * self._window_shards]
        rows = np.concatenate([np.arange(first, first + count) for first, count in self._shards[members]])
        return rows[permutation(self._seed, f"clips of {self.domain}", number, window, count=len(rows))]
