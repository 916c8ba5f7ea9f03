"""Load the pool of images that few-shot tasks are drawn from: all images of the seen, val or unseen classes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from refilled.data.class_split import SIDES, Side
from refilled.data.decoded import NO_DIGESTS, all_rows, decode_part, decode_with_one_range, grey_notes, refuse_bad
from refilled.data.division import rows_of_classes, split_of
from refilled.data.opening import data_folder, open_source
from refilled.data.source import Names, merge_parts
from refilled.data.task import Split, Task, fingerprint
from refilled.data.task_size import automatic_size
from refilled.data.task_text import TaskOptions, parse_task_text
from refilled.errors import TaskError, unknown


def load_pool(
    text: str,
    side: Side,
    *,
    data_root: Path | None = None,
    image_size: int | None = None,
    allow_bad: bool = False,
    memory_limit: int | None = None,
) -> Task:
    """Load all images of the classes on one side of a class split, from all parts of the source.

    Args:
        text: A task's text without a selection of classes: ``cifar_fs``, ``photos@split=mine.json``. See
            :func:`~refilled.data.class_split.split_classes` for the choice of the split.
        side: ``"seen"``, ``"val"`` or ``"unseen"``.
        data_root: Folder of the data sets. None: ``REFILLED_DATA`` or ``~/.cache/refilled/data``.
        image_size: Side length S in pixels. None: that of the split or the source, else from the images.
        allow_bad: Leave out unreadable images even if they are more than 1 %.
        memory_limit: Bytes above which the images lie on disk. None: a quarter of the free memory.

    Returns:
        A task with all images in ``train``; ``val`` and ``test`` are empty.

    Raises:
        TaskError: The text is invalid, the data are missing or damaged, there is no split, or this side of the split is
            empty.
    """
    if side not in SIDES:
        raise TaskError(unknown("side", side, SIDES))
    root = data_folder(data_root)
    parsed = parse_task_text(text, root, TaskOptions(size=image_size))
    if parsed.selection is not None:
        raise TaskError(f"'{text}' selects classes, but here the split does so; leave out ':{parsed.selection}'")
    source = open_source(parsed, root)
    split = split_of(source, parsed)
    classes = getattr(split, side)
    if not classes:
        raise TaskError(f"the split of {parsed.source} has no {side} classes")
    part = merge_parts(source).train
    size = parsed.options.size or split.image_size or source.image_size or automatic_size(source.train)
    # All sides share one range of levels, that of the seen classes.
    seen, chosen = rows_of_classes(part, split.seen), rows_of_classes(part, classes)
    decoded, grey = decode_with_one_range(
        lambda grey: {"train": decode_part(part, chosen, all_rows, NO_DIGESTS, size, memory_limit, grey)},
        part,
        seen,
        parsed.options,
    )
    images = decoded["train"]
    if not allow_bad:
        refuse_bad(images.skipped, len(images.rows))
    labels = np.searchsorted(classes, part.labels[images.rows])
    train = Split(images.pixels, torch.from_numpy(labels), Names(part, images.rows))
    empty = Split(images.pixels[:0], train.labels[:0], ())
    names = tuple(source.classes[position] for position in classes)
    return Task(
        name=replace(parsed, selection=side).resolved(root),
        classes=names,
        train=train,
        val=empty,
        test=empty,
        image_size=size,
        augmentation=parsed.options.augment or split.augmentation or source.augmentation,
        fingerprint=fingerprint(names, (train,)),
        skipped=images.skipped,
        notes=(*source.notes, *grey_notes(grey)),
        ignored=source.ignored,
        grey_range=grey,
        licence=source.licence,
        citation=source.citation,
    )
