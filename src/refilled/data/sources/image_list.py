"""One list of images: which columns hold names and labels, and the file of each row."""

import re
from collections import Counter
from pathlib import Path, PurePosixPath

from refilled.data.sources.columns import LABEL_NAMES, Cells, Column, choose_label, choose_part, plain_name, require
from refilled.data.sources.list_text import FILE_COLUMNS, are_numbers, has_header, read_list, to_numbers
from refilled.data.sources.listed_images import ListedImages
from refilled.errors import TaskError
from refilled.words import count_of

_SAMPLE = 50  # rows that decide what a column holds


class ImageList:
    """A list of images and labels. Call :meth:`choose_columns` before you read names, labels, files or parts.

    Args:
        file: The list.
        images: The files that its names may stand for.

    Raises:
        TaskError: The list cannot be read.
    """

    def __init__(self, file: Path, images: ListedImages) -> None:
        self.file, self.images = file, images
        self._rows, self._lines, note = read_list(file)
        self.notes = [note] if note else []
        self._has_header = has_header(self._rows, self._is_there)
        if self._has_header:
            self.columns = self._rows.pop(0)
            self._lines.pop(0)
        else:
            self.columns = [str(number + 1) for number in range(max(map(len, self._rows), default=0))]
        self._image = self._label = -1
        self._above = 0  # leading folders of absolute names that are above the root

    def finds_images(self) -> bool:
        """Return whether one of the first rows names an existing image."""
        return any(map(self._hits, range(len(self.columns))))

    def names_labels(self) -> bool:
        """Return whether a column has a usual name for labels, or the list has several columns and no header."""
        if not self._has_header:
            return len(self.columns) > 1
        return any(plain_name(column) in LABEL_NAMES for column in self.columns)

    def has_label_column_of(self, other: "ImageList") -> bool:
        """Return whether this list has the label column of another list, as far as the headers tell."""
        if not self._has_header:
            return len(self.columns) > 1
        if self.names_labels() and (not other._has_header or other.names_labels()):
            return True
        return other._has_header and plain_name(other.label_column) in map(plain_name, self.columns)

    @property
    def label_column(self) -> str:
        """The name of the label column."""
        return self.columns[self._label]

    @property
    def part_column(self) -> str | None:
        """The name of the column that gives the part of each row, or None."""
        if not self._has_header:
            return None
        return choose_part([column for place, column in enumerate(self.columns) if place != self._label])

    def choose_columns(self, image: str | None, label: str | None) -> None:
        """Choose the columns of image names and of labels.

        Args:
            image: The column of names. None: found by name and values.
            label: The column of labels. None: found by name, or the only other column.

        Raises:
            TaskError: The columns cannot be found, a row lacks one of them, or none of the images exists.
        """
        for column in (image, label):
            if column is not None:
                require(column, self.columns, str(self.file))
        if not self._rows:
            raise TaskError(f"{self.file} is empty: it needs rows with the name of an image and a label")
        self._image = self._find_image_column() if image is None else self.columns.index(image)
        self._above = self._folders_above()
        self._refuse_none_there()
        self._label = self.columns.index(self._find_label_column() if label is None else label)
        for row, line in zip(self._rows, self._lines, strict=True):
            if max(self._image, self._label) >= len(row) or not _path_parts(row[self._image]):
                raise TaskError(
                    f"{self.file}, line {line}: '{' '.join(row)[:60]}' is not a file name and a label; write both, or "
                    "remove the line"
                )
            if ".." in _path_parts(row[self._image]):  # it could lead anywhere
                raise TaskError(f"{self.file}, line {line}: '{row[self._image]}' leads out of {self.images.root}")

    def names(self) -> list[str]:
        """Return the image names as written."""
        return [row[self._image] for row in self._rows]

    def labels(self) -> list[str]:
        """Return the labels as written."""
        return self._column(self._label)

    def files(self) -> list[PurePosixPath]:
        """Return the file of each row relative to the root, also if it does not exist."""
        return [self._find(name) or PurePosixPath(*self._relative_parts(name)) for name in self.names()]

    def line(self, row: int) -> int:
        """Return the line of a row in the file, from 1."""
        return self._lines[row]

    def parts(self) -> list[str] | None:
        """Return the part of each row as written, or None if no column gives parts."""
        column = self.part_column
        return None if column is None else self._column(self.columns.index(column))

    def _refuse_none_there(self) -> None:
        names = [name for name in self._column(self._image) if name]
        if names and not any(".." in _path_parts(name) or self._find(name) for name in names):
            raise TaskError(
                f"none of the {count_of(len(names), 'image')} in column '{self.columns[self._image]}' of {self.file} "
                f"is below {self.images.root}; the first is '{names[0]}'. Put the images there, or name the column of "
                "image names with @image=COLUMN"
            )

    def _column(self, place: int) -> list[str]:
        return [row[place] if place < len(row) else "" for row in self._rows]

    def _find_image_column(self) -> int:
        def likelihood(place: int) -> tuple[bool, int, int, int]:
            name, hits = plain_name(self.columns[place]), self._hits(place)
            preference = -FILE_COLUMNS.index(name) if name in FILE_COLUMNS else -len(FILE_COLUMNS)
            return name not in LABEL_NAMES and hits > 0, preference, hits, len(set(self._column(place)))

        return max(range(len(self.columns)), key=likelihood)

    def _find_label_column(self) -> str:
        others = [column for place, column in enumerate(self.columns) if place != self._image]
        if len(others) == 1 and choose_part(others) is None:
            return others[0]  # the only thing that the list gives for its images
        columns = [Column(column, "text") for column in others]

        def read(column: str) -> dict[str, list[Cells]]:
            labels = self._column(self.columns.index(column))
            return {"train": [Cells(str(self.file), to_numbers(labels) if are_numbers(labels) else labels)]}

        return choose_label(columns, self.columns, str(self.file), read)

    def _hits(self, place: int) -> int:
        """Return how many of the first rows name an existing image in this column."""
        return sum(map(self._is_there, self._column(place)[:_SAMPLE]))

    def _is_there(self, cell: str) -> bool:
        """Return whether a cell names an existing image; an absolute name may lack any of its leading folders."""
        parts = _path_parts(cell)
        cuts = range(len(parts)) if _is_absolute(cell) else [0]
        return any(self._exists("/".join(parts[cut:])) for cut in cuts)

    def _exists(self, name: str) -> bool:
        try:
            match = self.images.find(name, self.file.stem)
        except TaskError:  # several files have the name
            return True
        return match is not None and match != PurePosixPath(self.file.name)

    def _folders_above(self) -> int:
        """Return how many leading folders of absolute names are above the root, as in most of the first rows."""
        names = [_path_parts(name) for name in self._column(self._image)[:_SAMPLE] if _is_absolute(name)]
        cuts = (
            next((cut for cut in range(len(parts)) if self._exists("/".join(parts[cut:]))), None) for parts in names
        )
        counts = Counter(cut for cut in cuts if cut is not None)
        return counts.most_common(1)[0][0] if counts else 0

    def _relative_parts(self, name: str) -> list[str]:
        return _path_parts(name)[self._above if _is_absolute(name) else 0 :]

    def _find(self, name: str) -> PurePosixPath | None:
        return self.images.find("/".join(self._relative_parts(name)), self.file.stem)


def _path_parts(name: str) -> list[str]:
    """Split a path of a list, in the notation of any operating system."""
    return [part for part in re.split(r"[/\\]", re.sub("^[A-Za-z]:", "", name)) if part not in ("", ".")]


def _is_absolute(name: str) -> bool:
    return bool(re.match(r"[/\\]|[A-Za-z]:[/\\]", name))
