"""All packed folders of a run as one table of clips by domain, and the order in which each domain is read."""

import math
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from moss_train.data.shards.format import SAMPLE_ARRAYS
from moss_train.data.shards.index import ClipLocation, ShardIndex
from moss_train.utils.errors import UserError

CHUNK_ROWS = 2**20
"""Number of clips that are processed together when all clips of a domain are scanned."""


class Corpus:
    """Several packed folders as one table; each row is a clip."""

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        self._indexes = tuple(indexes)
        self._first_rows = np.cumsum([0] + [len(index) for index in self._indexes])

    @classmethod
    def load(cls, sources: Sequence[str | Path], *, sampling_rate: int, num_channels: int) -> "Corpus":
        """Load packed folders. Raises UserError when one does not have the wanted sampling rate or channels."""
        indexes = [ShardIndex.load(source) for source in sources]
        need = f"sampling_rate={sampling_rate} num_channels={num_channels}"
        for index in indexes:
            have = f"sampling_rate={index.sampling_rate} num_channels={index.num_channels}"
            if have != need:
                raise UserError(
                    f"{index.folder} is packed with {have}, the model needs {need}; pack the audio again with {need}"
                )
        if not any(len(index) for index in indexes):
            raise UserError("no clips: give at least one folder made by `moss_train pack`")
        places = Counter(index.url or str(index.folder.resolve()) for index in indexes)
        for place, count in places.items():
            if count > 1:
                warnings.warn(
                    f"{place} is given {count} times, its clips are used {count} times as often", stacklevel=3
                )
        return cls(indexes)

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def column(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return the values of one sample array for the given rows, in their order."""
        values = np.empty(len(rows), dtype=SAMPLE_ARRAYS[name])
        sources = np.searchsorted(self._first_rows, rows, side="right") - 1
        for source in np.unique(sources):
            inside = sources == source
            values[inside] = self._indexes[source].arrays[name][rows[inside] - self._first_rows[source]]
        return values

    def locate(self, row: int) -> ClipLocation:
        """Return where the clip of one row lies."""
        source = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self._indexes[source].locate(row - int(self._first_rows[source]))

    def shard_ranges(self) -> dict[str, np.ndarray]:
        """Return domain -> rows of its shards, [shards, 2] first row and count; domains in alphabetical order."""
        ranges: dict[str, list[np.ndarray]] = {}
        for index, first in zip(self._indexes, self._first_rows[:-1], strict=True):
            shards = index.shards
            rows = np.stack([shards.first_rows[:-1] + first, shards.counts], axis=1)
            for number, domain in enumerate(shards.domains):
                ranges.setdefault(domain, []).append(rows[shards.domain_numbers == number])
        return {domain: np.concatenate(ranges[domain]) for domain in sorted(ranges)}

    def iter_chunks(self, domain: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the lengths and the text flags of all clips of a domain, in chunks that fit into memory."""
        for index in self._indexes:
            for begin, end in index.shards.runs_of(domain):
                for first in range(begin, end, CHUNK_ROWS):
                    piece = slice(first, min(end, first + CHUNK_ROWS))
                    lengths = index.arrays["num_samples"][piece]
                    if lengths.min() < 1:
                        raise UserError(f"the index of {index.folder} is damaged: clips without samples; pack it again")
                    yield lengths, index.arrays["has_text"][piece]


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
        """Return the rows of the elements first, first + 1, ... as int64 [count]."""
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
        """Return the shard order of a pass, and the place in the pass at which each window of shards begins."""
        order = permutation(self._seed, f"shards of {self.domain}", number, count=len(self._shards))
        ends = np.cumsum(self._shards[order, 1])
        starts = ends - self._shards[order, 1]
        return order, starts[:: self._window_shards]

    def _make_window_rows(self, number: int, window: int) -> np.ndarray:
        order, _ = self._pass_layout(number)
        members = order[window * self._window_shards : (window + 1) * self._window_shards]
        rows = np.concatenate([np.arange(first, first + count) for first, count in self._shards[members]])
        return rows[permutation(self._seed, f"clips of {self.domain}", number, window, count=len(rows))]


def raw_numbers(seed: int, purpose: str, *place: int, count: int) -> np.ndarray:
    """Return `count` uniform uint64, the same for the same seed, purpose and place."""
    entropy = (seed, zlib.crc32(purpose.encode()), *place)
    return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)


def permutation(seed: int, purpose: str, *place: int, count: int) -> np.ndarray:
    """Return a random order of range(count), int64."""
    return np.argsort(raw_numbers(seed, purpose, *place, count=count), kind="stable")


def uniforms(seed: int, purpose: str, *place: int, count: int) -> np.ndarray:
    """Return `count` numbers in [0, 1), multiples of 2^-24 so that they stay below 1 in float32 too."""
    return (raw_numbers(seed, purpose, *place, count=count) >> np.uint64(40)) * 2.0**-24


_SHARE_BITS = 40  # shares are whole numbers of 2^-40, so that counts far into the stream are exact


class DomainMixture:
    """Mixes the domains block by block: every block of positions has an exact count of each domain, in an order
    shuffled by (seed, block).

    The counts follow the shares cumulatively, so the error after any number of blocks is below one sample per domain.
    """

    def __init__(self, shares: Sequence[float], seed: int) -> None:
        self._seed = seed
        total = sum(shares)
        self._numerators = [round(share / total * 2**_SHARE_BITS) for share in shares]
        self._largest = int(np.argmax(self._numerators))
        # The largest domain absorbs rounding errors; a block this long always has enough of it.
        self.block_size = 1024 * math.ceil(len(shares) / 32) ** 2

    def counts_before(self, block: int) -> list[int]:
        """Return how many samples of each domain lie in the blocks before this one."""
        position = block * self.block_size
        counts = [numerator * position >> _SHARE_BITS for numerator in self._numerators]
        counts[self._largest] += position - sum(counts)
        return counts

    def block(self, block: int) -> tuple[np.ndarray, list[int], list[int]]:
        """Return the domain number of every position of a block, and each domain's first element and count in it."""
        before, after = self.counts_before(block), self.counts_before(block + 1)
        counts = [end - begin for begin, end in zip(before, after, strict=True)]
        labels = np.repeat(np.arange(len(counts)), counts)
        return labels[permutation(self._seed, "domains", block, count=self.block_size)], before, counts


def domain_shares(
    domains: Sequence[str], mean_seconds: Sequence[float], seconds: Sequence[float], weights: Mapping[str, float] | None
) -> list[float]:
    """Return each domain's share of samples that gives the wanted shares of audio seconds.

    A share of seconds divided by the mean seconds per sample is a share of samples. Without weights, the wanted shares
    are those of the available seconds. Raises UserError if weights name an unknown domain or leave one out, or if they
    are negative or all zero.
    """
    if weights is None:
        weights = dict(zip(domains, seconds, strict=True))
    unknown = sorted(set(weights) - set(domains))
    if unknown:
        raise UserError(f"weights name the domain {unknown[0]!r}, which no shard has; there are {', '.join(domains)}")
    missing = sorted(set(domains) - set(weights))
    if missing:
        raise UserError(f"weights do not name the domain {missing[0]!r}; give it a weight, 0 leaves it out")
    if min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise UserError(f"weights={dict(weights)} have to be 0 or more and not all 0")
    shares = [weights[domain] / mean for domain, mean in zip(domains, mean_seconds, strict=True)]
    return [share / sum(shares) for share in shares]
