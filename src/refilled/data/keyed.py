"""Random numbers without state: a pure function of their keys.

The order of samples and the augmentation use them, and therefore depend only on the seed, the epoch and the image, not
on the batch, the number of workers, or the step at which a run was interrupted.

References: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014 (splitmix64);
Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011 (counters for keys).
"""

from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Key = int | str | NDArray[Any]


def keyed_bits(*keys: Key) -> NDArray[np.uint64]:
    """Return 64 random bits, a hash of the keys. Integer arrays among the keys are broadcast.

    A string names a purpose, so that draws for different purposes are independent:
    ``keyed_bits(seed, "crop", epoch, indices)`` has the shape of ``indices``.
    """
    bits = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            bits = _splitmix(bits + np.uint64(0x9E3779B97F4A7C15) + _as_uint64(key))
    return bits


def keyed_uniform(*keys: Key) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1), of the shape that the keys broadcast to."""
    return np.asarray((keyed_bits(*keys) >> np.uint64(11)) * 2.0**-53)


def keyed_integers(below: int, *keys: Key) -> NDArray[np.int64]:
    """Return uniform integers from 0 to ``below - 1``, of the shape that the keys broadcast to."""
    return np.asarray(np.floor(keyed_uniform(*keys) * below), dtype=np.int64)


def keyed_permutation(length: int, *keys: Key) -> NDArray[np.int64]:
    """Return a random permutation of 0 .. ``length - 1``. The keys must be scalars."""
    return np.argsort(keyed_bits(*keys, np.arange(length)), kind="stable")


def _as_uint64(key: Key) -> NDArray[np.uint64]:
    if isinstance(key, str):
        key = crc32(key.encode())
    if isinstance(key, int):
        key = key % 2**64
    return np.asarray(key).astype(np.uint64)


def _splitmix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of splitmix64: each input bit flips each output bit with probability near one half."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
