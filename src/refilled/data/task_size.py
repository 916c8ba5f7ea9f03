"""The size of a task's images, and the size of a task before it is loaded."""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from refilled.data.decode import find_grey_range, read_pixels, short_side
from refilled.data.division import open_and_divide
from refilled.data.opening import data_folder
from refilled.data.source import Part, Rows, Source
from refilled.data.task_text import TaskOptions, TaskText, parse_task_text
from refilled.data.transforms import Augmentation
from refilled.data.unlabelled import REST, open_unlabelled

LARGEST_AUTOMATIC_SIZE = 224
"""Largest side length in pixels that is found from the images."""
_SAMPLE = 256  # images that are looked at


@dataclass(frozen=True)
class TaskSize:
    """How large a task is. The numbers of images include those that may prove unreadable or copies."""

    class_names: tuple[str, ...]
    train: int
    val: int
    test: int
    image_size: int
    """Side length S in pixels."""
    augmentation: Augmentation
    """The augmentation that suits the source."""
    images_per_second: float
    """Decoding speed on this machine, measured on a few of the images."""
    unlabelled: int = 0


def task_size(
    text: str,
    *,
    data_root: Path | None = None,
    shots: int | None = None,
    val: float = 0.1,
    image_size: int | None = None,
    unlabelled: str | None = None,
) -> TaskSize:
    """Return how large a task is, from a few of its images; the arguments are those of :func:`load_task`.

    Raises:
        TaskError: As :func:`load_task`, except for errors that only the pixels show.
    """
    root = data_folder(data_root)
    parsed = parse_task_text(text, root, TaskOptions(shots=shots, val=float(val), size=image_size))
    source, division = open_and_divide(parsed, root)
    counts = np.bincount(division.parts["train"].labels[division.rows["train"]])
    if parsed.options.shots is not None:
        counts = counts.clip(max=parsed.options.shots)
    size = settle_image_size(parsed, source)
    extra = 0
    if unlabelled == REST:
        extra = len(division.rows["train"]) - int(counts.sum())
    elif unlabelled is not None:
        extra = len(open_unlabelled(unlabelled, root)[1])
    return TaskSize(
        class_names=tuple(source.classes[position] for position in division.classes),
        train=int(counts.sum()),
        val=len(division.rows["val"]),
        test=len(division.rows["test"]),
        image_size=size,
        augmentation=parsed.options.augment or source.augmentation,
        images_per_second=_decoding_rate(division.parts["train"], division.rows["train"], size),
        unlabelled=extra,
    )


def settle_image_size(text: TaskText, source: Source) -> int:
    """Return the side length in pixels: that of the text, else of the source, else found from the images."""
    return text.options.size or source.image_size or automatic_size(source.train)


def automatic_size(part: Part) -> int:
    """Return the median short side in pixels of images spread evenly over a part, at most 224."""
    rows = np.unique(np.linspace(0, len(part.labels) - 1, _SAMPLE).astype(np.int64))
    sides = [side for side in map(short_side, part.pictures(rows)) if side is not None]
    return min(LARGEST_AUTOMATIC_SIZE, int(np.median(sides))) if sides else LARGEST_AUTOMATIC_SIZE


def _decoding_rate(part: Part, rows: Rows, size: int) -> float:
    """Return the images decoded per second, timed on the first rows: a table is read in pieces of many rows."""
    sample = rows[:_SAMPLE]
    grey = find_grey_range(part.pictures(sample))
    start = perf_counter()
    read_pixels(part.pictures(sample), len(sample), size, grey)
    return len(sample) / (perf_counter() - start)
