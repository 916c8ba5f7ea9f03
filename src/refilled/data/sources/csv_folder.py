"""Flat folders of images with lists of who is who: MiniImageNet's ``train.csv``, ``val.csv`` and ``test.csv``."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from refilled.data.source import Source
from refilled.data.sources.image_folder import FolderPart
from refilled.errors import TaskError

_PARTS = ("train", "val", "test")
_COLUMNS = ("filename", "label")
_PLACES = ("images", ".")  # of the images, below the folder


def is_csv_folder(root: Path) -> bool:
    """Whether a folder has the three lists, and the first image of each that is listed is where it should be."""
    return all((root / f"{part}.csv").is_file() for part in _PARTS) and _place(root) is not None


def open_csv_folder(root: Path) -> Source:
    """Open ``root/{train,val,test}.csv``, with the columns filename and label, and the images in ``root/images``.

    The lists of MiniImageNet (Ravi and Larochelle, ICLR 2017) have this form. Images that are listed but not there are
    reported when they are decoded.

    Raises:
        TaskError: A list cannot be read, or lacks a column.
    """
    place = _place(root)
    assert place is not None  # is_csv_folder has been asked
    listed = {part: list(_rows(root / f"{part}.csv")) for part in _PARTS}
    classes = sorted({label for rows in listed.values() for _, label in rows})
    number = {name: position for position, name in enumerate(classes)}
    parts = {
        part: FolderPart(
            np.array([number[label] for _, label in rows], dtype=np.int64),
            tuple(place / file for file, _ in rows),
            root,
        )
        for part, rows in listed.items()
    }
    return Source(tuple(classes), parts["train"], parts["val"], parts["test"])


def _place(root: Path) -> Path | None:
    first = next(_rows(root / "train.csv"), None)
    if first is None:
        return None
    return next((root / place for place in _PLACES if (root / place / first[0]).is_file()), None)


def _rows(file: Path) -> Iterator[tuple[str, str]]:
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            reader = csv.DictReader(opened)
            if not set(_COLUMNS) <= set(reader.fieldnames or ()):
                raise TaskError(f"{file} must have the columns {' and '.join(_COLUMNS)}, separated by a comma")
            for row in reader:
                name, label = (row[column] or "" for column in _COLUMNS)
                if Path(name).name != name or not label:  # a name with a folder in it could lead anywhere
                    raise TaskError(f"{file}, line {reader.line_num}: '{name}', '{label}' is no file name and label")
                yield name, label
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"{file} cannot be read: {error}") from error
