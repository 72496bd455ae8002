"""A pseudo-random order of any number of examples that is computed, not stored."""

from __future__ import annotations

import numpy as np

_ROUNDS = 6


def permuted(index: np.ndarray, size: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Places of `index` in a permutation of `0 .. size-1` that `(seed, epoch)` draws.

    A Feistel network (Luby and Rackoff 1988) on the smallest even number of bits that holds `size`, walked until
    the result is below `size` (Black and Rogaway 2002). Every element is computed on its own, in vectorised
    integer arithmetic: no state, no memory, the same on every machine and with every version of every library.

    Args:
      index: int64 [n], each in `[0, size)`.
      size: number of examples.
      seed: any integer in `[0, 2**63)`.
      epoch: int64 [n]; every epoch has its own permutation.

    Returns:
      int64 [n].

    >>> sorted(permuted(np.arange(5), 5, seed=0, epoch=np.zeros(5, int)).tolist())
    [0, 1, 2, 3, 4]
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    key = _mix(_mix(np.uint64(seed) ^ np.zeros(len(index), np.uint64)) ^ epoch.astype(np.uint64))
    value = index.astype(np.uint64)
    outside = np.ones(len(index), bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & low
        for i in range(_ROUNDS):
            left, right = right, left ^ (_mix(key[outside] ^ (right + np.uint64(i << 32))) & low)
        value[outside] = (left << half) | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood 2014) on `value + golden ratio`."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
