"""Which column of a table holds the images and which the labels, and what the cells of a label column mean.

A label column is known by its name or by its type ``ClassLabel``, never because no other column is left. A column with
another value in each row is no label, whatever its name.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from refilled.data.source import Rows, part_called
from refilled.errors import TaskError, unknown

IMAGE_NAMES = ("img", "image", "picture", "pixels")
LABEL_NAMES = (
    "label",
    "labels",
    "fine_label",
    "class",
    "class_name",
    "target",
    "category",
    "class_id",
    "class_label",
    "label_id",
    "label_name",
    "category_id",
    "category_name",
    "classes",
    "targets",
    "categories",
)
"""What label columns are called; of several, the one that stands first here is taken."""

PART_COLUMNS = ("split", "part", "set", "fold", "subset", "partition", "usage", "phase")
"""What a column is called that says which part a row belongs to."""

_WRITABLE = re.compile("[^,=@:/]+")  # what the text of a task can hold after @label=
_SHOWN = 8  # columns, values or classes that an error lists


@dataclass(frozen=True)
class Column:
    """A column that could hold labels."""

    name: str
    type: str
    """As the table calls it."""
    names: tuple[str, ...] | None = None
    """The names of the classes 0, 1, ..., where the table says them."""


@dataclass(frozen=True)
class Cells:
    """The label column of one file."""

    where: str
    """The file, for errors."""
    values: Sequence[Any]
    names: Mapping[int, str] | None = None
    """The name of each integer label, where the file says it."""


def choose_image(candidates: Sequence[str], columns: Sequence[str], where: str) -> str:
    """Choose the image column among those of a fitting type: the only one, or one with a usual name.

    Raises:
        TaskError: None can be told from the others.
    """
    if len(candidates) == 1:
        return candidates[0]
    by_name = [column for name in IMAGE_NAMES for column in candidates if _plain(column) == name]
    if by_name:
        return by_name[0]
    raise TaskError(
        f"cannot tell which column of {where} is the image: it has {', '.join(columns)}; add @image=COLUMN to the task"
    )


def choose_label(
    candidates: Sequence[Column],
    columns: Sequence[str],
    where: str,
    read: Callable[[str], Mapping[str, Sequence[Cells]]],
) -> str:
    """Choose the label column among those of a fitting type, by its name, or as the only ``ClassLabel``.

    Args:
        candidates: The columns whose values can be classes.
        columns: The names of all columns, for the error.
        where: What to call the table in errors.
        read: Reads a column of every file of every part, to tell which columns the error can recommend.

    Raises:
        TaskError: There is none; the error names the columns that can be chosen and the words that choose them.
    """
    by_name = [column.name for name in LABEL_NAMES for column in candidates if _plain(column.name) == name]
    if by_name:
        return by_name[0]
    by_type = [column.name for column in candidates if column.names is not None]
    if len(by_type) == 1:
        return by_type[0]
    question = f"cannot tell which column of {where} is the label: it has {', '.join(columns)}"
    usable = [column for column in candidates if _is_usable(column.name, read)]
    if not usable:
        raise TaskError(
            f"{question}. None of them can be: a label is text, true or false, or a whole number, is given for every "
            "image, and is the same for several; add a column 'label'"
        )
    shown = "; ".join(f"{advice(column.name)} ({column.type})" for column in usable[:_SHOWN])
    raise TaskError(f"{question}. Add one of these to the task: {shown}")


def _is_usable(column: str, read: Callable[[str], Mapping[str, Sequence[Cells]]]) -> bool:
    try:
        read_labels(read(column), column)
    except TaskError:
        return False
    return True


def advice(column: str) -> str:
    """Return the words that choose a column as the label."""
    if _WRITABLE.fullmatch(column):
        return f"@label={column}"
    return f"@label=NEWNAME after renaming column {column!r}, whose name the text of a task cannot hold"


def read_labels(parts: Mapping[str, Sequence[Cells]], column: str) -> tuple[tuple[str, ...], dict[str, Rows]]:
    """Turn the labels of all parts into positions in one tuple of class names.

    Text is its own name and comes in alphabetical order; numbers come in their order. Booleans, and floats that are
    whole, are read as they are meant: ``True``, ``1.0``. Every file is looked at: all must hold the same kind of label,
    and give the same number the same name.

    Args:
        parts: The label column of every file of every part.
        column: Its name, for errors.

    Raises:
        TaskError: Cells are empty, are no labels, contradict each other, lack a name, or all differ.
    """
    read = {part: [_read(cells, column) for cells in files] for part, files in parts.items()}
    files = [file for part in read.values() for file in part]
    _refuse_mixture([file for file in files if file.values], column)
    names = _names(files, column)
    values = {value for file in files for value in file.values}
    everywhere = " and ".join(dict.fromkeys(file.where for file in files[:2])) + (" and others" if files[2:] else "")
    if not values:
        raise TaskError(f"column '{column}' of {everywhere} holds nothing: there are no rows")
    refuse_all_different(sum(len(file.values) for file in files), len(values), column, everywhere)
    if names is None:
        names = {value: str(value) for value in values}
    for file in files:
        for value in file.values:
            if value not in names:
                raise TaskError(
                    f"column '{column}' of {file.where} holds label {value!r}, but there are names for {min(names)} to "
                    f"{max(names)} only"
                )
    position = {value: place for place, value in enumerate(sorted(names))}
    labels = {
        part: np.array([position[value] for file in found for value in file.values], dtype=np.int64)
        for part, found in read.items()
    }
    return tuple(names[value] for value in position), labels


def refuse_all_different(rows: int, values: int, column: str, where: str) -> None:
    """Raise a :class:`TaskError` if no two rows share a value: such a column numbers the images."""
    if rows > 2 and rows == values:
        raise TaskError(
            f"column '{column}' of {where} is no label: it holds another value in each of its {rows} rows, so that no "
            "two images share a class. Name the label with @label=COLUMN"
        )


@dataclass(frozen=True)
class _File:
    """The labels of one file: all of them int, all bool or all str."""

    where: str
    values: list[Any]
    names: dict[int, str] | None

    @property
    def kind(self) -> str:
        return {bool: "true or false", int: "integers", str: "text"}[type(self.values[0])]


def _read(cells: Cells, column: str) -> _File:
    where = f"column '{column}' of {cells.where}"
    empty = sum(map(_is_empty, cells.values))
    if empty:
        raise TaskError(
            f"{where} has {empty} empty cells among {len(cells.values)}: every image needs a label; fill them, remove "
            "those rows, or name another column with @label=COLUMN"
        )
    values = [_label(value, where) for value in cells.values]
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TaskError(f"{where} must hold one kind of label, but holds {found}")
    return _File(cells.where, values, None if cells.names is None else dict(cells.names))


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or (value in ("", b""))


def _label(value: Any, where: str) -> bool | int | str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise TaskError(f"{where} holds bytes that are no text; name the label with @label=COLUMN") from None
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == math.floor(value):
        return int(value)
    if isinstance(value, bool | int | str):
        return value
    kind = "fractions" if isinstance(value, float | Decimal) else type(value).__name__
    raise TaskError(
        f"{where} holds {kind} such as {str(value)[:40]}, which are no classes: a label is text, true or false, or a "
        "whole number. Name another column with @label=COLUMN"
    )


def _refuse_mixture(files: Sequence[_File], column: str) -> None:
    for file in files[1:]:
        if file.kind != files[0].kind:
            raise TaskError(
                f"column '{column}' holds {files[0].kind} in {files[0].where}, but {file.kind} in {file.where}; write "
                "it alike in all files"
            )


def _names(files: Sequence[_File], column: str) -> dict[Any, str] | None:
    """Join the names that the files give their integer labels; None where none gives any."""
    if any(file.values and isinstance(file.values[0], str | bool) for file in files):
        return None
    joined: dict[Any, str] = {}
    said_in: dict[Any, str] = {}
    for file in files:
        for value, name in (file.names or {}).items():
            if joined.setdefault(value, name) != name:
                raise TaskError(
                    f"{said_in[value]} and {file.where} contradict each other: in column '{column}', label {value} is "
                    f"'{joined[value]}' in the one and '{name}' in the other; write both with the same names of classes"
                )
            said_in.setdefault(value, file.where)
    return joined or None


def choose_part(columns: Sequence[str]) -> str | None:
    """Return the column that may say the part of each row, or None."""
    return next((column for name in PART_COLUMNS for column in columns if _plain(column) == name), None)


def rows_of_parts(values: Sequence[Any], column: str, where: str) -> tuple[dict[str, Rows], tuple[str, ...]]:
    """Divide rows by the name of a part that each holds, such as ``train`` or ``Validation``.

    Returns:
        The rows of each part, all of them in ``train`` if the column names no parts; and notes for the reader of
        results.

    Raises:
        TaskError: Only some of the values are names of parts, or none is that of the training part.
    """
    parts = [part_called(str(value)) for value in values]
    others = sorted({str(value) for value, part in zip(values, parts, strict=True) if part is None})
    shown = ", ".join(map(repr, others[:_SHOWN]))
    if not any(parts):
        everything = {"train": np.arange(len(values))}
        return everything, (
            f"column '{column}' of {where} names no parts ({shown}) and was not used",
        ) if others else ()
    if others:
        raise TaskError(
            f"column '{column}' of {where} names parts, but also holds {shown}; write train, validation or test for "
            "each image, or rename the column"
        )
    named = np.array(parts)
    rows: dict[str, Rows] = {p: np.flatnonzero(named == p) for p in ("train", "val", "test") if p in parts}
    if "train" not in rows:
        raise TaskError(f"column '{column}' of {where} gives no image to the training part; write train for some")
    return rows, (f"parts as in column '{column}' of {where}",)


def require(column: str, columns: Iterable[str], where: str) -> None:
    """Raise a :class:`TaskError` if a file does not have a column."""
    columns = list(columns)
    if column not in columns:
        raise TaskError(f"{where}: {unknown('column', column, columns)}")


def _plain(name: str) -> str:
    """Write a column's name as the usual names are written."""
    return re.sub(r"[\s_.-]+", "_", name.strip().casefold())
