"""Cut held-out parts and draw shots, class by class, with copies of a picture on the same side.

If a data set can grow, a cut depends on the content of each picture: an added, removed, renamed or moved file does not
change the side of any other picture. If the publisher has fixed the rows of a data set, a cut depends on the row, and
the parts have exactly the requested sizes.
"""

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from refilled.data.decode import regular_file_size
from refilled.data.keyed import keyed_bits, keyed_uniform
from refilled.data.source import Crop, Picture, Rows

DIGEST = np.dtype("S16")
Digests = NDArray[np.bytes_]
"""Digests of N pictures, as an array, which takes a fifth of the memory of a tuple of bytes."""

_END = 2**15  # bytes at the start and at the end of a file that identify its content


def hold_out_by_content(
    rows: Rows, labels: Rows, keys: NDArray[np.uint64], fraction: float, *, seed: int, purpose: str
) -> tuple[Rows, Rows]:
    """Hold out about a fraction of every class, decided for each picture independently of the others.

    Each picture is held out with probability ``fraction``, decided by a hash of (seed, purpose, key). Pictures with
    equal keys are on the same side. Only two guarantees depend on the whole class: if it has two or more different
    pictures, at least one is held out and at least one stays. If the hash selects none, the picture with the lowest
    hash is held out; if it selects all, the one with the highest hash stays. The only picture of a class stays. If
    classes share pictures, the guarantee for one class may break that for another.

    Args:
        rows: The part's rows to divide ``(N,)``.
        labels: Their classes ``(N,)``.
        keys: Their keys ``(N,)``; see :func:`content_keys`.
        fraction: Fraction to hold out, in [0, 1).
        seed: The task's seed.
        purpose: Name of the cut; cuts with different names are independent.

    Returns:
        The rows that stay and the rows that are held out, ascending.
    """
    chance = keyed_uniform(seed, purpose, keys)
    held = set(keys[chance < fraction].tolist())
    for label in np.unique(labels):
        own, luck = keys[labels == label], chance[labels == label]
        if own.min() == own.max():
            held.discard(int(own[0]))
        elif fraction > 0 and held.isdisjoint(own.tolist()):
            held.add(int(own[luck.argmin()]))
        elif held.issuperset(own.tolist()):
            held.discard(int(own[luck.argmax()]))
    out = np.isin(keys, np.array(sorted(held), dtype=np.uint64))
    return rows[~out], rows[out]


def hold_out(rows: Rows, labels: Rows, firsts: Rows, fraction: float, *, seed: int, purpose: str) -> tuple[Rows, Rows]:
    """Hold out a fraction of every class.

    Of a class with n different pictures, ``fraction * n`` are held out, rounded, but at least one stays and, if
    n >= 2, at least one is held out. Copies of a picture are on the side of the first one. The choice is a function of
    (seed, purpose, row) and does not depend on other classes.

    Args:
        rows: The part's rows to divide ``(N,)``.
        labels: Their classes ``(N,)``.
        firsts: The first row with the same picture, for each row ``(N,)``; see :func:`first_rows`.
        fraction: Fraction to hold out, in [0, 1).
        seed: The task's seed.
        purpose: Name of the cut; cuts with different names are independent.

    Returns:
        The rows that stay and the rows that are held out, ascending.
    """
    leads = firsts == rows
    rank, count = _rank_in_class(labels[leads], keyed_bits(seed, purpose, rows[leads]))
    size = np.floor(fraction * count + 0.5)
    size = np.minimum(np.maximum(size, 1), count - 1) if fraction > 0 else np.zeros_like(size)
    held = np.isin(firsts, rows[leads][rank < size])
    return rows[~held], rows[held]


def draw_shots(rows: Rows, labels: Rows, shots: int, *, seed: int, shots_seed: int) -> Rows:
    """Return ``shots`` rows of every class, ascending, or all rows of a smaller class.

    With the same seeds, fewer shots are a subset of more. Removing a row does not change the choice of other rows,
    except that it may add one row of its class.
    """
    rank, _ = _rank_in_class(labels, keyed_bits(seed, "shots", shots_seed, rows))
    return rows[rank < shots]


def content_keys(pictures: Iterable[Picture]) -> NDArray[np.uint64]:
    """Return a key for each of N pictures ``(N,)``, computed from its content as stored.

    The key of a picture depends on its size in bytes and its first and last 32 KiB, but not on the name or folder of
    its file. The key of a crop depends on the path of its file and on its box. The key of an unreadable file depends on
    its name.
    """
    return np.fromiter(
        (int.from_bytes(_content_digest(picture)[:8], "little") for picture in pictures), dtype=np.uint64
    )


def first_rows(rows: Rows, keys: NDArray[np.uint64]) -> Rows:
    """Return the first row with the same key, for each row ``(N,)``."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return rows[first[inverse]]


def pixel_digests(pixels: Tensor) -> Digests:
    """Return a digest of each of the uint8 images ``(N, 3, S, S)``. Equal digests mean equal pixels."""
    return np.array([_digest(image) for image in pixels.permute(0, 2, 3, 1).numpy()], dtype=DIGEST)


def _rank_in_class(labels: Rows, keys: NDArray[np.uint64]) -> tuple[Rows, Rows]:
    """Return the rank of each row by key within its class, and the size of its class."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.lexsort((keys, inverse))
    rank = np.empty_like(inverse)
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank, counts[inverse]


def _digest(content: bytes | NDArray[np.uint8]) -> bytes:
    if isinstance(content, np.ndarray):
        content = content.tobytes()
    return blake2b(content, digest_size=DIGEST.itemsize).digest()


def _content_digest(picture: Picture) -> bytes:
    if isinstance(picture, Path):
        return _digest(_ends_of_file(picture) or picture.name.encode(errors="surrogateescape"))
    if isinstance(picture, Crop):
        return _digest(repr(picture).encode(errors="surrogateescape"))
    content = picture if isinstance(picture, bytes) else picture.tobytes()
    return _digest(_ends(len(content), content[:_END], content[max(_END, len(content) - _END) :]))


def _ends_of_file(path: Path) -> bytes | None:
    size = regular_file_size(path)
    if not size:
        return None
    try:
        with path.open("rb") as file:
            first = file.read(_END)
            file.seek(max(_END, size - _END))
            return _ends(size, first, file.read())
    except OSError:  # it will be reported as unreadable when it is decoded
        return None


def _ends(size: int, first: bytes, last: bytes) -> bytes:
    return size.to_bytes(8, "little") + first + last
