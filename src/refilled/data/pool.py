"""The images that few-shot tasks are drawn from: all that there are of the seen, the val or the unseen classes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from refilled.data.class_split import SIDES, Side
from refilled.data.decode import find_grey_range
from refilled.data.loading import (
    NO_DIGESTS,
    automatic_size,
    choose_grey_range,
    data_folder,
    decode_part,
    grey_notes,
    lacks_grey_range,
    open_source,
    refuse_bad,
    split_of,
)
from refilled.data.source import Names, pool
from refilled.data.task import Split, Task, fingerprint
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
    """Load all images of the classes on one side of a class split, from whatever part of the source they are in.

    Args:
        text: A task's text without a selection of classes: ``cifar_fs``, ``photos@split=mine.json``; see
            :func:`~refilled.data.class_split.split_classes` for where the split comes from.
        side: ``"seen"``, ``"val"`` or ``"unseen"``.
        data_root: Where data sets lie; ``REFILLED_DATA`` or ``~/.cache/refilled/data`` if None.
        image_size: Side length S; what the split or the source says, else found from the images, if None.
        allow_bad: Leave out images that cannot be read even if they are more than 1 %.
        memory_limit: Bytes above which the images lie on disk; a quarter of the memory that is free if None.

    Returns:
        A task whose images are all in ``train``; ``val`` and ``test`` are empty.

    Raises:
        TaskError: The text is not understood, the data are missing or damaged, there is no split, or it leaves this
            side empty.
    """
    if side not in SIDES:
        raise TaskError(unknown("side", side, SIDES))
    root = data_folder(data_root)
    wanted = parse_task_text(text, root, TaskOptions(size=image_size))
    if wanted.selection is not None:
        raise TaskError(f"'{text}' selects classes, but the split does that; leave out ':{wanted.selection}'")
    source = open_source(wanted, root)
    split = split_of(source, wanted)
    classes = getattr(split, side)
    if not classes:
        raise TaskError(f"the split of {wanted.source} has no {side} classes")
    part = pool(source).train
    size = wanted.options.size or split.image_size or source.image_size or automatic_size(source.train)
    # One range of levels for all sides, that of the classes that are trained on.
    seen, chosen = (np.flatnonzero(np.isin(part.labels, some)) for some in (split.seen, classes))
    grey = choose_grey_range(part, seen, wanted.options)
    found = decode_part(part, chosen, lambda rows: rows, NO_DIGESTS, size, memory_limit, grey)
    if grey is None and lacks_grey_range([found]) and (grey := find_grey_range(part.pictures(seen))) is not None:
        found = decode_part(part, chosen, lambda rows: rows, NO_DIGESTS, size, memory_limit, grey)
    if not allow_bad:
        refuse_bad(found.skipped, len(found.rows))
    labels = np.searchsorted(classes, part.labels[found.rows])
    images = Split(found.pixels, torch.from_numpy(labels), Names(part, found.rows))
    nothing = Split(found.pixels[:0], images.labels[:0], ())
    names = tuple(source.classes[position] for position in classes)
    return Task(
        name=replace(wanted, selection=side).resolved(root),
        classes=names,
        train=images,
        val=nothing,
        test=nothing,
        image_size=size,
        augmentation=wanted.options.augment or split.augmentation or source.augmentation,
        fingerprint=fingerprint(names, (images,)),
        skipped=found.skipped,
        notes=(*source.notes, *grey_notes(grey)),
        grey_range=grey,
        licence=source.licence,
        citation=source.citation,
    )
