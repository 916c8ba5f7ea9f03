"""Divide a source for a task: its classes, the rows of train, val and test, and cuts for parts that it lacks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from refilled.data.class_split import SIDES, ClassSplit, parts_share_no_class, split_classes
from refilled.data.opening import open_source
from refilled.data.partition import content_keys, first_rows, hold_out, hold_out_by_content
from refilled.data.selection import select_classes
from refilled.data.several import NONE, Several
from refilled.data.source import Part, Rows, Source, merge_parts
from refilled.data.task_text import TaskOptions, TaskText
from refilled.errors import TaskError
from refilled.words import count_of

TEST_FRACTION = 0.2
"""Fraction of each class that is cut off as the test part, where the source has none."""


@dataclass(frozen=True)
class Division:
    """The rows of a source's parts that make up train, val and test."""

    classes: tuple[int, ...]
    """Positions in the source's classes."""
    parts: dict[str, Part]
    rows: dict[str, Rows]
    cut: frozenset[str]
    """Names of the parts that were cut off the training part."""
    notes: tuple[str, ...]
    copies: Several = NONE
    """Images that equal an earlier one, where parts were cut."""


def open_and_divide(text: TaskText, data_root: Path) -> tuple[Source, Division]:
    """Open the source of a task's text and divide it.

    Raises:
        TaskError: The source cannot be opened, or the chosen classes cannot be divided.
    """
    source = open_source(text, data_root)
    if text.options.test is not None:
        source = merge_parts(source)
    source, classes = choose_classes(source, text)
    return source, _divide(source, classes, text.options)


def choose_classes(source: Source, text: TaskText) -> tuple[Source, Sequence[int]]:
    """Return the source and the positions of the classes that a task's text selects.

    For one side of a class split, parts of the source that share no class are merged, since they describe the split.
    The merged part is then divided again.
    """
    if text.selection not in SIDES or text.selection in source.classes:
        return source, select_classes(text.selection, source.classes, seed=text.options.seed)
    split = split_of(source, text)
    if parts_share_no_class(source):
        source = merge_parts(source)
    source = replace(
        source,
        image_size=split.image_size or source.image_size,
        augmentation=split.augmentation or source.augmentation,
    )
    return source, getattr(split, text.selection)


def split_of(source: Source, text: TaskText) -> ClassSplit:
    """Return the class split for a task's text; see :func:`~refilled.data.class_split.split_classes`."""
    path = Path(text.source)
    folder = None
    if text.kind in ("path", "wds"):
        folder = path if path.is_dir() else path.parent
    return split_classes(source, path.name, folder, text.options.split)


def rows_of_classes(part: Part | None, classes: Sequence[int]) -> Rows:
    """Return the rows ``(N,)`` of a part whose labels are among the classes; empty for no part."""
    if part is None:
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(np.isin(part.labels, classes))


def _divide(source: Source, chosen: Sequence[int], options: TaskOptions) -> Division:
    """Choose the rows of every part, and cut off the parts that the source lacks."""
    given = {
        "train": source.train,
        "val": _with_images(source.val, chosen) if options.val else None,
        "test": _with_images(source.test, chosen),
    }
    parts = {name: part or source.train for name, part in given.items()}
    rows = {name: rows_of_classes(part, chosen) for name, part in given.items()}
    fractions = {"test": options.test or TEST_FRACTION, "val": options.val}
    cut = {name: fraction for name, fraction in fractions.items() if given[name] is None and fraction}
    cut_rows, notes, copies = _cut(source, rows["train"], cut, options.seed)
    rows.update(cut_rows)
    present = {name: set(np.unique(parts[name].labels[rows[name]]).tolist()) for name in parts}
    for position in sorted((present["val"] | present["test"]) - present["train"]):
        raise TaskError(
            f"class '{source.classes[position]}' has images in val or test but none to train on; add training images, "
            "or choose the other classes"
        )
    classes = tuple(position for position in chosen if position in present["train"])
    if len(classes) < 2:
        raise TaskError(f"a task needs at least two classes with images to train on, but there are {len(classes)}")
    notes += _absence_note("no images, left out", source, set(chosen) - present["train"])
    if not len(rows["test"]):
        raise TaskError(
            "there are no images to test on: every class has a single image, which is used for training. Add images, "
            "or a test part"
        )
    for name in ("val", "test"):
        if len(rows[name]):
            notes += _absence_note(f"no {name} images", source, set(classes) - present[name])
    return Division(classes, parts, rows, frozenset(cut), tuple(notes), copies)


def _cut(
    source: Source, rows: Rows, fractions: dict[str, float], seed: int
) -> tuple[dict[str, Rows], list[str], Several]:
    """Cut held-out parts off the training part; return the rows of every part, notes, and the copies."""
    cut = {"train": rows}
    notes: list[str] = []
    if not fractions:
        return cut, notes, Several()
    part = source.train
    keys = np.zeros(len(part.labels), dtype=np.uint64)
    keys[rows] = content_keys(part.pictures(rows))
    copies = Several.of(rows[first_rows(rows, keys[rows]) != rows].tolist(), part.name)
    if copies.count:
        equal = count_of(copies.count, "image is a copy of another", "images are copies of others")
        notes.append(f"{equal}; copies are kept on one side of every cut")
    for name, fraction in fractions.items():
        remaining = cut["train"]
        labels, remaining_keys = part.labels[remaining], keys[remaining]
        if source.fixed:
            firsts = first_rows(remaining, remaining_keys)
            cut["train"], cut[name] = hold_out(remaining, labels, firsts, fraction, seed=seed, purpose=name)
        else:
            cut["train"], cut[name] = hold_out_by_content(
                remaining, labels, remaining_keys, fraction, seed=seed, purpose=name
            )
    if "test" in fractions:
        share = f"{fractions['test']:.0%}"
        about = "" if source.fixed else "about "
        notes.append(f"no test part: {about}{share} of the images of each class were cut off for it, seed {seed}")
    return cut, notes, copies


def _with_images(part: Part | None, chosen: Sequence[int]) -> Part | None:
    """Return the part if it has an image of the chosen classes, else None."""
    return part if len(rows_of_classes(part, chosen)) else None


def _absence_note(what: str, source: Source, absent: set[int]) -> list[str]:
    if not absent:
        return []
    names = [source.classes[position] for position in sorted(absent)]
    return [f"{what}: {Several.of(names)}"]
