"""Read the text of a list of images: its encoding, its delimiter, its rows of cells, and whether it has a header."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from refilled.data.decode import SUFFIXES
from refilled.data.sources.columns import LABEL_NAMES, plain_name
from refilled.errors import TaskError

FILE_COLUMNS = (
    "filename",
    "file_name",
    "file",
    "image",
    "img",
    "image_name",
    "imagename",
    "image_file",
    "image_path",
    "img_path",
    "filepath",
    "filepaths",
    "file_path",
    "path",
    "image_id",
    "picture",
    "photo",
    "name",
    "id",
)
"""Usual names of the column of image names, in order of preference."""

_DELIMITERS = ",;\t"


class ListText(NamedTuple):
    """The rows of a list; empty rows are left out."""

    rows: list[list[str]]
    """The cells of each row, without surrounding blanks and without empty cells at the end."""
    lines: list[int]
    """The line in the file on which each row ends, from 1."""
    note: str | None
    """Set if the encoding is not UTF-8 and was guessed."""


def read_list(file: Path) -> ListText:
    """Read a list, in any of the usual encodings and with any of the usual delimiters.

    Raises:
        TaskError: The file cannot be read, is not text, has an unclosed quotation mark, or has a cell that is too long.
    """
    text, note = _decode(file)
    rows, lines = _split(text, file)
    return ListText(rows, lines, note)


def has_header(rows: Sequence[Sequence[str]], is_image: Callable[[str], bool]) -> bool:
    """Return whether the first row holds the names of the columns.

    Args:
        rows: The rows of a list.
        is_image: Returns whether a cell names an existing image.
    """
    if not rows:
        return False
    first = rows[0]
    if any(is_image(cell) or PurePosixPath(cell).suffix.lower() in SUFFIXES for cell in first):
        return False
    if _has_usual_name(first):
        return True
    # A row that names a missing image looks like a header too, unless its label occurs again.
    below = rows[1:]
    again = any(cell and cell in (row[place] for row in below if place < len(row)) for place, cell in enumerate(first))
    return bool(below) and not again


def are_numbers(labels: Sequence[str]) -> bool:
    """Return whether all labels are written as numbers, such as ``7`` or ``7.0``; ``007`` is text."""
    return all(re.fullmatch(r"-?(0|[1-9][0-9]{0,8})(\.[0-9]+)?", label) for label in labels)


def to_numbers(labels: Sequence[str]) -> list[str | int | float]:
    """Convert labels to numbers; see :func:`are_numbers`."""
    return [float(label) if "." in label else int(label) for label in labels]


def _decode(file: Path) -> tuple[str, str | None]:
    """Return the text of a file, and a note if its encoding had to be guessed."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise TaskError(f"{file} cannot be read: {error.strerror}") from error
    encoding, guess = _encoding(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise TaskError(f"{file} is not text in {encoding} ({error}); save it as UTF-8") from error
    if "\0" in text:
        raise TaskError(f"{file} is not text: it contains null bytes; save the list as CSV in UTF-8")
    return text, guess and f"{file.name} is not UTF-8 and was read as {guess}"


def _encoding(content: bytes) -> tuple[str, str | None]:
    """Return the name of an encoding for Python, and its name for people if it is a guess."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16", None
    if content[1:2] == b"\0" or content[:1] == b"\0":  # the first letter of a list is in ASCII
        return ("utf-16-le" if content[1:2] == b"\0" else "utf-16-be"), "UTF-16"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        try:
            content.decode("cp1252")
        except UnicodeDecodeError:
            return "latin-1", "Latin-1"
        return "cp1252", "Windows-1252"
    return "utf-8-sig", None


def _split(text: str, file: Path) -> tuple[list[list[str]], list[int]]:
    """Return the rows and their lines, split at the most likely delimiter."""
    delimiters = _DELIMITERS
    if declaration := re.match(r"sep=(.)\s*\n", text):  # Excel declares the delimiter so
        delimiters, text = declaration[1], "\n" + text[declaration.end() :]
    tables, errors = [], []
    for delimiter in delimiters:
        try:
            tables.append(_cells(text, delimiter, file))
        except TaskError as error:  # perhaps because of a wrong delimiter
            errors.append(error)
    best = max(tables, key=lambda table: _likelihood(table[0]), default=None)
    if best is None or (errors and _likelihood(best[0])[2] < 2):
        raise errors[0]
    return best


def _cells(text: str, delimiter: str, file: Path) -> tuple[list[list[str]], list[int]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows, lines = [], []
    try:
        for row in reader:
            cells = [cell.strip().removeprefix("\ufeff") for cell in row]
            if any("\n" in cell or "\r" in cell for cell in cells):
                raise TaskError(f"{file}, line {reader.line_num}: an earlier quotation mark is not closed")
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                rows.append(cells)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise TaskError(f"{file}, line {reader.line_num}, cannot be read: {error}") from error
    return rows, lines


def _likelihood(rows: Sequence[Sequence[str]]) -> tuple[bool, float, int]:
    """Return a key that ranks delimiters: a usual column name, rows of equal length above one, cells per row."""
    if not rows:
        return False, 0.0, 0
    length, count = Counter(map(len, rows)).most_common(1)[0]
    return _has_usual_name(rows[0]) and len(rows[0]) > 1, count / len(rows) if length > 1 else 0.0, length


def _has_usual_name(cells: Sequence[str]) -> bool:
    """Return whether one of the cells is a usual name of the column of image names or of labels."""
    return bool({*map(plain_name, cells)} & {*FILE_COLUMNS, *LABEL_NAMES})
