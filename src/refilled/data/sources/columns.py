"""Find the columns of images and labels in a table, and convert the cells of a label column.

A label column is recognised by its name or by its type ``ClassLabel``, never because no other column is left. A column
with a different value in each row is not a label column, whatever its name.
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
from refilled.words import count_of

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
"""Usual names of label columns, in order of preference."""

PART_COLUMNS = ("split", "part", "set", "fold", "subset", "partition", "usage", "phase")
"""Usual names of a column that gives the part of each row, in order of preference."""

_WRITABLE = re.compile("[^,=@:/]+")  # names that can follow @label= in the text of a task
_SHOWN = 8  # columns, values or classes that an error lists


@dataclass(frozen=True)
class Column:
    """A column that could hold labels."""

    name: str
    type: str
    """The type's name in the table's format."""
    names: tuple[str, ...] | None = None
    """Names of the classes 0, 1, ..., if the table gives them."""


@dataclass(frozen=True)
class Cells:
    """The label column of one file."""

    where: str
    """The file, for errors."""
    values: Sequence[Any]
    names: Mapping[int, str] | None = None
    """The name of each integer label, if the file gives it."""


def choose_image(candidates: Sequence[str], columns: Sequence[str], where: str) -> str:
    """Return the image column: the only candidate, or one with a usual name.

    Args:
        candidates: The columns whose type can hold images.
        columns: The names of all columns, for the error.
        where: The name of the table, for the error.

    Raises:
        TaskError: There are several candidates or none, and no usual name among them.
    """
    if len(candidates) == 1:
        return candidates[0]
    by_name = [column for name in IMAGE_NAMES for column in candidates if plain_name(column) == name]
    if by_name:
        return by_name[0]
    raise TaskError(
        f"cannot tell which column of {where} holds the images: it has {', '.join(columns)}; add @image=COLUMN to the "
        "task"
    )


def choose_label(
    candidates: Sequence[Column],
    columns: Sequence[str],
    where: str,
    read: Callable[[str], Mapping[str, Sequence[Cells]]],
) -> str:
    """Return the label column: one with a usual name, or the only ``ClassLabel``.

    Args:
        candidates: The columns whose type can hold labels.
        columns: The names of all columns, for the error.
        where: The name of the table, for the error.
        read: Returns the cells of a column, by part and file; decides which columns the error recommends.

    Raises:
        TaskError: There is none. The message lists the usable columns and the option that selects each.
    """
    by_name = [column.name for name in LABEL_NAMES for column in candidates if plain_name(column.name) == name]
    if by_name:
        return by_name[0]
    by_type = [column.name for column in candidates if column.names is not None]
    if len(by_type) == 1:
        return by_type[0]
    question = f"cannot tell which column of {where} holds the labels: it has {', '.join(columns)}"
    usable = [column for column in candidates if _is_usable(column.name, read)]
    if not usable:
        raise TaskError(
            f"{question}. None of them qualifies: a label is text, true or false, or a whole number; every image has "
            "one, and several images share it. Add a column 'label'"
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
    """Return the option of a task's text that selects a column as the label."""
    if _WRITABLE.fullmatch(column):
        return f"@label={column}"
    return f"@label=NEWNAME after renaming column {column!r}, whose name cannot be written in the text of a task"


def read_labels(parts: Mapping[str, Sequence[Cells]], column: str) -> tuple[tuple[str, ...], dict[str, Rows]]:
    """Convert the labels of all parts to positions in one tuple of class names.

    Classes are sorted: text alphabetically, numbers by value. Text labels are their own class names. Whole floats, such
    as ``1.0``, are converted to integers. All files must hold the same kind of label, and must give the same number the
    same name.

    Args:
        parts: The label column of every file of every part.
        column: Its name, for errors.

    Returns:
        The names of the C classes, and the positions ``(N,)`` of the labels of each part.

    Raises:
        TaskError: Cells are empty, are not labels, contradict each other, lack a name, or all differ.
    """
    read = {part: [_read(cells, column) for cells in files] for part, files in parts.items()}
    files = [file for part in read.values() for file in part]
    _refuse_mixture([file for file in files if file.values], column)
    names = _names(files, column)
    values = {value for file in files for value in file.values}
    everywhere = " and ".join(dict.fromkeys(file.where for file in files[:2])) + (" and others" if files[2:] else "")
    if not values:
        raise TaskError(f"column '{column}' of {everywhere} is empty: there are no rows")
    refuse_all_different(sum(len(file.values) for file in files), len(values), column, everywhere)
    if names is None:
        names = {value: str(value) for value in values}
    for file in files:
        for value in file.values:
            if value not in names:
                raise TaskError(
                    f"column '{column}' of {file.where} holds label {value!r}, but names exist only for "
                    f"{min(names)} to {max(names)}"
                )
    position = {value: place for place, value in enumerate(sorted(names))}
    labels = {
        part: np.array([position[value] for file in part_files for value in file.values], dtype=np.int64)
        for part, part_files in read.items()
    }
    return tuple(names[value] for value in position), labels


def refuse_all_different(rows: int, values: int, column: str, where: str) -> None:
    """Raise a :class:`TaskError` if no two of more than two rows share a value; such a column numbers the images."""
    if rows > 2 and rows == values:
        raise TaskError(
            f"column '{column}' of {where} is not a label: its {rows} rows all hold different values, so that no two "
            "images share a class. Name the label with @label=COLUMN"
        )


@dataclass(frozen=True)
class _File:
    """The labels of one file: all int, all bool or all str."""

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
            f"{where} has {count_of(empty, 'empty cell')} among {len(cells.values)}: every image needs a label; "
            "fill them, remove those rows, or name another column with @label=COLUMN"
        )
    values = [_label(value, where) for value in cells.values]
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        mixture = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TaskError(f"{where} must hold one kind of label, but holds {mixture}")
    return _File(cells.where, values, None if cells.names is None else dict(cells.names))


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or (value in ("", b""))


def _label(value: Any, where: str) -> bool | int | str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise TaskError(f"{where} holds bytes that are not text; name the label with @label=COLUMN") from None
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == math.floor(value):
        return int(value)
    if isinstance(value, bool | int | str):
        return value
    kind = "fractions" if isinstance(value, float | Decimal) else type(value).__name__
    raise TaskError(
        f"{where} holds {kind} such as {str(value)[:40]}, which cannot be labels: a label is text, true or false, or a "
        "whole number. Name another column with @label=COLUMN"
    )


def _refuse_mixture(files: Sequence[_File], column: str) -> None:
    for file in files[1:]:
        if file.kind != files[0].kind:
            raise TaskError(
                f"column '{column}' holds {files[0].kind} in {files[0].where}, but {file.kind} in {file.where}; write "
                "labels of one kind in all files"
            )


def _names(files: Sequence[_File], column: str) -> dict[Any, str] | None:
    """Merge the names that the files give their integer labels. Return None if no file gives any."""
    if any(file.values and isinstance(file.values[0], str | bool) for file in files):
        return None
    merged: dict[Any, str] = {}
    source: dict[Any, str] = {}
    for file in files:
        for value, name in (file.names or {}).items():
            if merged.setdefault(value, name) != name:
                raise TaskError(
                    f"{source[value]} and {file.where} contradict each other: in column '{column}', label {value} is "
                    f"'{merged[value]}' in the first and '{name}' in the second; use the same class names in both"
                )
            source.setdefault(value, file.where)
    return merged or None


def choose_part(columns: Sequence[str]) -> str | None:
    """Return the column that may give the part of each row, or None."""
    return next((column for name in PART_COLUMNS for column in columns if plain_name(column) == name), None)


def rows_of_parts(values: Sequence[Any], column: str, where: str) -> tuple[dict[str, Rows], tuple[str, ...]]:
    """Divide rows by the part that each one names, such as ``train`` or ``Validation``.

    Returns:
        The rows of each part, and notes for the reader of results. If the column names no parts, all rows are in
        ``train``.

    Raises:
        TaskError: Only some of the values name parts, or no row is in the training part.
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
    """Raise a :class:`TaskError` if a column is not among the columns of a file."""
    columns = list(columns)
    if column not in columns:
        raise TaskError(f"{where}: {unknown('column', column, columns)}")


def plain_name(name: str) -> str:
    """Return a column's name in the spelling of the usual names: lower case, words separated by underscores."""
    return re.sub(r"[\s_.-]+", "_", name.strip().casefold())
