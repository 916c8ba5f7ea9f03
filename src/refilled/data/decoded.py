"""Decode the chosen rows of a source's parts, into memory or into the store on disk."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from refilled.data.decode import find_grey_range, has_deep, keep, read_pixels
from refilled.data.division import Division
from refilled.data.grey import DEEP, GreyRange
from refilled.data.partition import DIGEST, Digests, draw_shots, pixel_digests
from refilled.data.several import Several
from refilled.data.source import Names, Part, Rows, Source
from refilled.data.store import Pixels, StoredImages, free_memory, stored_images
from refilled.data.task import Split
from refilled.data.task_text import TaskOptions
from refilled.errors import TaskError
from refilled.words import count_of, plural

MAX_BAD_FRACTION = 0.01
"""Largest fraction of unreadable images that is left out without ``allow_bad``."""
NO_DIGESTS: Digests = np.empty(0, dtype=DIGEST)
_FIRST = 32  # images whose headers decide whether to look for a range of levels; a table gives its first rows quickly
_SHOWN = 5  # images that an error lists


@dataclass(frozen=True)
class Decoded:
    """The images of one part that were read and kept."""

    part: Part
    rows: Rows
    pixels: Pixels
    digests: Digests
    """Digests of the pixels ``(N,)``."""
    skipped: tuple[tuple[str, str], ...]
    """(image, reason) of the unreadable ones."""
    copies: Several
    """Images left out because they equal a held-out image."""


def decode_division(
    division: Division, options: TaskOptions, size: int, memory_limit: int | None, known: GreyRange | None
) -> tuple[dict[str, Decoded], GreyRange | None]:
    """Decode train, val and test with one range of levels.

    Args:
        division: The rows of each part.
        options: The task's options: shots, seeds and bits.
        size: Side length S of the images.
        memory_limit: Bytes above which a part's images lie on disk. None: a quarter of the free memory.
        known: Black and white of pictures with more than 8 bits per channel. None: found from the training images.

    Returns:
        The images of each part, and the range of levels; None if no picture needed one.
    """
    return decode_with_one_range(
        lambda grey: _decode_parts(division, options, size, memory_limit, grey),
        division.parts["train"],
        division.rows["train"],
        options,
        known,
    )


def decode_with_one_range(
    decode: Callable[[GreyRange | None], dict[str, Decoded]],
    part: Part,
    rows: Rows,
    options: TaskOptions,
    known: GreyRange | None = None,
) -> tuple[dict[str, Decoded], GreyRange | None]:
    """Decode with a range of levels, found from training images where it is needed and not known.

    Args:
        decode: Decodes all parts with a range; None leaves out the pictures that need one.
        part: The part of the training images.
        rows: Their rows ``(N,)``.
        options: The task's options; ``bits`` settles the range.
        known: The range, if it is known.

    Returns:
        The decoded parts, and the range; None if no picture needed one.
    """
    grey = known or _choose_grey_range(part, rows, options)
    decoded = decode(grey)
    if grey is None and _lacks_grey_range(decoded.values()):  # pictures after the first ones have more than 8 bits
        grey = find_grey_range(part.pictures(rows))
        if grey is not None:
            decoded = decode(grey)
    return decoded, grey


def decode_part(
    part: Part,
    candidates: Rows,
    choose: Callable[[Rows], Rows],
    avoid: Digests,
    size: int,
    memory_limit: int | None,
    grey: GreyRange | None,
) -> Decoded:
    """Decode some of the candidate rows; choose again from the others where an image is unusable.

    Args:
        part: The part of the rows.
        candidates: Rows to choose from ``(N,)``, ascending.
        choose: Takes rows and returns some of them.
        avoid: Digests of pixels that must not occur.
        size: Side length S of the images.
        memory_limit: Bytes above which the images lie on disk. None: a quarter of the free memory.
        grey: Black and white of pictures with more than 8 bits per channel. None: such pictures are unreadable.
    """
    limit = free_memory() // 4 if memory_limit is None else memory_limit
    skipped: dict[int, str] = {}
    copies = Several()
    while True:
        rows = choose(candidates)
        pixels, reasons, digests = _read(part, rows, size, limit, grey)
        fresh = ~np.isin(digests, avoid)
        usable = np.delete(rows, list(reasons))[fresh]
        skipped.update({int(rows[position]): reason for position, reason in reasons.items()})
        copies += Several.of(np.delete(rows, list(reasons))[~fresh].tolist(), part.name)
        if len(usable) == len(rows) or len(rows) == len(candidates):
            break
        candidates = np.setdiff1d(candidates, np.setdiff1d(rows, usable))
    return Decoded(
        part=part,
        rows=usable,
        pixels=pixels.keep(fresh) if isinstance(pixels, StoredImages) else keep(pixels, fresh),
        digests=digests[fresh],
        skipped=tuple((part.name(row), reason) for row, reason in sorted(skipped.items())),
        copies=copies,
    )


def all_rows(candidates: Rows) -> Rows:
    """Choose all candidates, for :func:`decode_part`."""
    return candidates


def labelled_split(decoded: Decoded, classes: Sequence[int]) -> Split:
    """Return decoded images with class ids 0 .. C-1, the places of their labels in ``classes`` (ascending)."""
    labels = np.searchsorted(classes, decoded.part.labels[decoded.rows])
    names = Names(decoded.part, decoded.rows)
    return Split(decoded.pixels, torch.from_numpy(labels.astype(np.int64)), names, decoded.digests)


def refuse_bad(skipped: Sequence[tuple[str, str]], read: int) -> None:
    """Raise a :class:`TaskError` if more than 1 % of the images are unreadable.

    Args:
        skipped: (image, reason) of the unreadable images.
        read: Number of images that were read.
    """
    total = len(skipped) + read
    if len(skipped) <= MAX_BAD_FRACTION * total:
        return
    first = "; ".join(f"{name}: {reason}" for name, reason in skipped[:_SHOWN])
    more = f"; and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
    raise TaskError(
        f"{len(skipped)} of {count_of(total, 'image')} cannot be read, more than {MAX_BAD_FRACTION:.0%}: {first}{more}"
        ". Repair or remove them, or leave them out with --allow-bad"
    )


def refuse_too_few(train: Decoded, division: Division, source: Source, shots: int | None) -> None:
    """Raise a :class:`TaskError` if a class has fewer readable training images than it needs."""
    counts = np.bincount(train.part.labels[train.rows], minlength=len(source.classes))
    for position in division.classes:
        if counts[position] < (shots or 1):
            raise TaskError(
                f"class '{source.classes[position]}' has {count_of(counts[position], 'readable image')} to train on, "
                f"after the held-out ones were cut off, fewer than the {shots or 1} needed; add images, ask for fewer "
                "shots, or choose other classes"
            )


def grey_notes(used: GreyRange | None, given: GreyRange | None = None) -> list[str]:
    """Return a note on the range of levels that was used, unless the caller gave it."""
    if used is None or given is not None:
        return []
    return [
        f"in images with more than 8 bits per channel, levels {used} became 0 to 255 in all parts; @bits=NUMBER in the "
        "task changes that"
    ]


def copies_notes(decoded: dict[str, Decoded]) -> list[str]:
    """Return notes on images that were left out as copies, and on copies that the source's own parts share."""
    left_out = {name: part.copies.count for name, part in decoded.items() if part.copies.count}
    notes = [
        f"{count_of(count, 'image')} of {name} left out: "
        f"{plural(count, 'it equals a held-out image', 'they equal held-out images')}"
        for name, count in left_out.items()
    ]
    for name in ("val", "test"):
        shared = int(np.isin(decoded[name].digests, decoded["train"].digests).sum())
        if shared:
            notes.append(f"{count_of(shared, 'image')} of {name} {plural(shared, 'is', 'are')} also in train")
    return notes


def _decode_parts(
    division: Division, options: TaskOptions, size: int, memory_limit: int | None, grey: GreyRange | None
) -> dict[str, Decoded]:
    """Decode every part.

    A cut keeps copies of a file together. Some pictures are stored differently and prove equal only when decoded. They
    leave the part that was cut later, so that the test images never depend on the training images.
    """

    def draw(candidates: Rows) -> Rows:
        if options.shots is None:
            return candidates
        labels = division.parts["train"].labels[candidates]
        return draw_shots(candidates, labels, options.shots, seed=options.seed, shots_seed=options.shots_seed)

    decoded: dict[str, Decoded] = {}
    held_out = NO_DIGESTS
    for name in ("test", "val", "train"):
        avoid = held_out if name in division.cut or name == "train" else NO_DIGESTS
        choose = draw if name == "train" else all_rows
        decoded[name] = decode_part(division.parts[name], division.rows[name], choose, avoid, size, memory_limit, grey)
        if name in division.cut:
            held_out = np.concatenate([held_out, decoded[name].digests])
    return decoded


def _read(
    part: Part, rows: Rows, size: int, limit: int, grey: GreyRange | None
) -> tuple[Pixels, dict[int, str], Digests]:
    """Read rows into memory, or map them from disk if they would take more than ``limit`` bytes."""
    if 3 * size**2 * len(rows) > limit:
        return stored_images(part, rows, size, grey)
    pixels, reasons = read_pixels(part.pictures(rows), len(rows), size, grey)
    return pixels, reasons, pixel_digests(pixels)


def _choose_grey_range(part: Part, rows: Rows, options: TaskOptions) -> GreyRange | None:
    """Return black and white for pictures with more than 8 bits per channel, if the first few are such pictures."""
    if options.bits is not None:
        return GreyRange.of_bits(options.bits)
    return find_grey_range(part.pictures(rows)) if has_deep(part.pictures(rows[:_FIRST])) else None


def _lacks_grey_range(decoded: Iterable[Decoded]) -> bool:
    """Return whether pictures were left out because their range of levels was not known."""
    # The start of the reason: the store on disk may hold the rest in an earlier wording.
    return any(reason.startswith(DEEP) for part in decoded for _, reason in part.skipped)
