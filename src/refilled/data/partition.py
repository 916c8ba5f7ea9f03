"""Cutting held-out parts and drawing shots, class by class, with copies of a picture kept together.

Where a data set can grow, a cut goes by the content of each picture: an added, removed, renamed or moved file changes
the side of no other picture. Where the rows of a data set are fixed by its publisher, a cut goes by row, and the parts
have exactly the sizes that were asked for.
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
"""Digests of N pictures, as an array: it takes a fifth of what a tuple of bytes does."""

_END = 2**15  # bytes at the beginning and at the end of a file that tell it from other files


def hold_out_by_content(
    rows: Rows, labels: Rows, keys: NDArray[np.uint64], fraction: float, *, seed: int, purpose: str
) -> tuple[Rows, Rows]:
    """Cut about a fraction off every class, so that adding or removing a picture changes the side of no other.

    Each picture is held out with probability ``fraction``, decided by a hash of (seed, purpose, key). Two guarantees
    have to look at a whole class, and are the only exceptions to that promise: of a class with two or more different
    pictures at least one is held out and at least one stays. Where chance holds out none, the picture with the lowest
    hash is held out; where it holds out all, the one with the highest hash stays. The only picture of a class stays.
    Pictures with equal keys are on the same side. Where classes share pictures, one guarantee may undo another.

    Args:
        rows: The part's rows to divide ``(N,)``.
        labels: Their classes ``(N,)``.
        keys: What each picture is known by ``(N,)``; see :func:`content_keys`.
        fraction: How much to hold out, in [0, 1).
        seed: The task's seed.
        purpose: Sets cuts from one seed apart.

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


def content_keys(pictures: Iterable[Picture]) -> NDArray[np.uint64]:
    """Return a number for each of N pictures ``(N,)`` that follows from its content, byte for byte as it is stored.

    The size and the first and last 32 KiB count, and of a file neither its name nor its place. A crop is known by its
    file's path and its box. A file that cannot be read is known by its name.
    """
    return np.fromiter(
        (int.from_bytes(_content_digest(picture)[:8], "little") for picture in pictures), dtype=np.uint64
    )


def first_rows(rows: Rows, keys: NDArray[np.uint64]) -> Rows:
    """For each row, return the first row with the same key ``(N,)``."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return rows[first[inverse]]


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
    except OSError:  # it will be listed as unreadable when it is decoded
        return None


def _ends(size: int, first: bytes, last: bytes) -> bytes:
    return size.to_bytes(8, "little") + first + last
