"""Random numbers as pure functions of (seed, purpose, place): no generator is carried along or has to be saved.

Only NumPy's raw bit streams are used: unlike `Generator.permutation` they are promised never to change.
"""

import zlib

import numpy as np


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
