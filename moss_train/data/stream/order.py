"""Random order and mix of domains as pure functions of (seed, purpose, place): no generator has to be saved.

Only NumPy's raw bit streams are used: unlike `Generator.permutation` they are promised never to change.
"""

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from moss_train.utils.errors import UserError


def raw_numbers(seed: int, purpose: str, *place: int, count: int) -> np.ndarray:
    """Return `count` uniform uint64, the same for the same seed, purpose and place."""
    entropy = (seed, zlib.crc32(purpose.encode()), *place)
    return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)


def permutation(seed: int, purpose: str, *place: int, count: int) -> np.ndarray:
    """Return a random order of range(count), int64."""
    return np.argsort(raw_numbers(seed, purpose, *place, count=count), kind="stable")


def units(seed: int, purpose: str, *place: int, count: int) -> np.ndarray:
    """Return `count` numbers in [0, 1), multiples of 2^-24 so that they stay below 1 in float32 too."""
    return (raw_numbers(seed, purpose, *place, count=count) >> np.uint64(40)) * 2.0**-24


_SHARE_BITS = 40  # shares are whole numbers of 2^-40, so that counts far into the stream are exact


class DomainMixture:
    """Positions come in blocks; every block has exact counts of each domain, in an order shuffled by (seed, block).

    The counts follow the shares cumulatively, so the error after any number of blocks is below one sample per domain.
    """

    def __init__(self, shares: Sequence[float], seed: int) -> None:
        self._seed = seed
        total = sum(shares)
        self._numerators = [round(share / total * 2**_SHARE_BITS) for share in shares]
        self._largest = int(np.argmax(self._numerators))
        # The largest domain takes what rounding leaves over; a block this long always has enough of it.
        self.block_size = 1024 * math.ceil(len(shares) / 32) ** 2

    def counts_before(self, block: int) -> list[int]:
        """How many samples of each domain lie in the blocks before this one."""
        position = block * self.block_size
        counts = [numerator * position >> _SHARE_BITS for numerator in self._numerators]
        counts[self._largest] += position - sum(counts)
        return counts

    def block(self, block: int) -> tuple[np.ndarray, list[int], list[int]]:
        """Domain number of every position of a block, and each domain's first element and count in it."""
        before, after = self.counts_before(block), self.counts_before(block + 1)
        counts = [end - begin for begin, end in zip(before, after, strict=True)]
        labels = np.repeat(np.arange(len(counts)), counts)
        return labels[permutation(self._seed, "domains", block, count=self.block_size)], before, counts


def domain_shares(
    domains: Sequence[str], mean_seconds: Sequence[float], seconds: Sequence[float], weights: Mapping[str, float] | None
) -> list[float]:
    """Share of samples per domain for the wanted share of audio seconds.

    A share of seconds divided by the mean seconds per sample is a share of samples. Without weights the available
    seconds are the shares. Raises UserError for weights of domains that are not there, negative or all zero.
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
