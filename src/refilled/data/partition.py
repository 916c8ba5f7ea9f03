"""Cutting held-out parts and drawing shots, class by class, with copies of a picture kept together."""

from collections import Counter
from collections.abc import Hashable, Iterable
from hashlib import blake2b, file_digest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from refilled.data.decode import regular_file_size
from refilled.data.keyed import keyed_bits
from refilled.data.source import Crop, Picture, Rows

DIGEST = np.dtype("S16")
Digests = NDArray[np.bytes_]
"""Digests of N pictures, as an array: it takes a fifth of what a tuple of bytes does."""


def hold_out(rows: Rows, labels: Rows, firsts: Rows, fraction: float, *, seed: int, purpose: str) -> tuple[Rows, Rows]:
    """Cut a fraction off every class; returns the rows that stay and the rows that are held out, ascending.

    Copies go together: a group of equal pictures is dealt with as its first one. Of a class with n different pictures
    ``fraction * n`` are held out, rounded, but at least one stays and, if n >= 2, at least one is held out; the only
    picture of a class stays. Which ones is a function of (seed, purpose, row): other classes do not matter.

    Args:
        rows: The part's rows to divide ``(N,)``.
        labels: Their classes ``(N,)``.
        firsts: For each, the first row that holds the same picture ``(N,)``; see :func:`first_copies`.
        fraction: How much to hold out, in [0, 1).
        seed: The task's seed.
        purpose: Sets cuts from one seed apart.
    """
    leads = firsts == rows
    rank, count = _rank_in_class(labels[leads], keyed_bits(seed, purpose, rows[leads]))
    wanted = np.floor(fraction * count + 0.5)
    wanted = np.minimum(np.maximum(wanted, 1), count - 1) if fraction > 0 else np.zeros_like(wanted)
    held = np.isin(firsts, rows[leads][rank < wanted])
    return rows[~held], rows[held]


def draw_shots(rows: Rows, labels: Rows, shots: int, *, seed: int, shots_seed: int) -> Rows:
    """Draw ``shots`` rows of every class, ascending; of a smaller class, all.

    Fewer shots of the same seeds are a subset of more, and removing a row changes no other choice.
    """
    rank, _ = _rank_in_class(labels, keyed_bits(seed, "shots", shots_seed, rows))
    return rows[rank < shots]


def first_copies(rows: Rows, pictures: Iterable[Picture]) -> Rows:
    """For each row, find the first row with the same picture, byte for byte as it is stored.

    Files are read only where another file has the same size. A crop is the same only as itself.
    """
    keys: list[Hashable] = [picture if isinstance(picture, Path | Crop) else _digest(picture) for picture in pictures]
    sizes = {key: regular_file_size(key) for key in keys if isinstance(key, Path)}
    shared = {size for size, count in Counter(sizes.values()).items() if size and count > 1}
    first: dict[Hashable, int] = {}
    return np.array(
        [
            first.setdefault(_file_digest(key) if isinstance(key, Path) and sizes[key] in shared else key, row)
            for row, key in zip(rows.tolist(), keys, strict=True)
        ],
        dtype=np.int64,
    )


def pixel_digests(pixels: Tensor) -> Digests:
    """Digest each of the uint8 images ``(N, 3, S, S)``; equal digests mean equal pixels."""
    return np.array([_digest(image) for image in pixels.permute(0, 2, 3, 1).numpy()], dtype=DIGEST)


def _rank_in_class(labels: Rows, keys: NDArray[np.uint64]) -> tuple[Rows, Rows]:
    """Return each element's rank by key among its class, and the size of its class."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.lexsort((keys, inverse))
    rank = np.empty_like(inverse)
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank, counts[inverse]


def _digest(content: bytes | NDArray[np.uint8]) -> bytes:
    if isinstance(content, np.ndarray):
        content = content.tobytes()
    return blake2b(content, digest_size=DIGEST.itemsize).digest()


def _file_digest(path: Path) -> Hashable:
    try:
        with path.open("rb") as file:
            return file_digest(file, "blake2b").digest()
    except OSError:  # it will be listed as unreadable when it is decoded
        return path
