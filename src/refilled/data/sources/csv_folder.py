"""Lists of names and labels beside images: ``labels.csv``, or ``train.csv``, ``val.csv`` and ``test.csv``.

The lists are read as people write them: with any of the usual encodings and separators, with or without a header, and
names with or without their folder or suffix, in the manner of any operating system. An image is looked for among the
files below one folder and nowhere else, whatever its name says.
"""

import csv
import io
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from refilled.data.decode import SUFFIXES
from refilled.data.source import Rows, SelectedPart, Source, part_called, stamp_of
from refilled.data.sources.columns import (
    LABEL_NAMES,
    Cells,
    Column,
    choose_label,
    choose_part,
    read_labels,
    require,
    rows_of_parts,
)
from refilled.data.sources.image_folder import FolderPart
from refilled.data.walking import is_hidden
from refilled.errors import TaskError

T = TypeVar("T")

LIST_SUFFIXES = (".csv", ".tsv", ".txt")
_FOLDER_SUFFIXES = (".csv", ".tsv")  # a .txt beside images is as likely to be a licence
_LISTS = ("labels", "label", "annotations", "metadata", "list", "images", "train_labels", "trainlabels")
"""What the one list of a folder is called."""
_IMAGE_NAMES = (
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
"""What the column of names is called; of several, the one that stands first here is taken."""
_SEPARATORS = ",;\t"
_LOOKED_AT = 50  # rows from which the form of a list is told
_SHOWN = 3  # names that an error or a note lists


def is_csv_folder(root: Path) -> bool:
    """Whether a folder holds lists that name some of its images and their labels.

    Where there are class folders too, only a list with a column such as ``label`` counts: others describe the images.
    """
    lists = [file for files in _lists_in(root).values() for file in files]
    if not lists:
        return False
    images = _Images(root)
    found = [listed for file in lists if (listed := _List(file, images)).finds_images()]
    return any(listed.names_labels() for listed in found) or bool(found and not images.in_folders())


def is_list(path: Path) -> bool:
    """Whether a path is a file with the suffix of a list."""
    return path.suffix.lower() in LIST_SUFFIXES and path.is_file()


def open_csv_folder(path: Path, image: str | None = None, label: str | None = None) -> Source:
    """Open the lists of a folder, or one list, and the images below the folder.

    ``train.csv``, ``val.csv`` and ``test.csv`` list a part each, the last two where they exist; the lists of
    MiniImageNet (Ravi and Larochelle, ICLR 2017) have this form. A single list, such as ``labels.csv``, may say the
    part of each image in a column such as ``split``.

    Images that are listed but not there are reported when they are decoded.

    Args:
        path: The folder or the list.
        image: The column of names; found by name and values if None. The columns of a list without a header are
            called 1, 2, ...
        label: The column of labels; found by name if None, or as the only other column.

    Raises:
        TaskError: A list cannot be read, lacks a column, or contradicts itself or another one.
    """
    root = path.parent if path.is_file() else path
    images = _Images(root)
    notes: list[str] = []
    found = {"train": [path]} if path.is_file() else _lists_in(path)
    for part, files in found.items():
        if len(files) > 1:
            raise TaskError(f"{root} has two lists of the {part} part, {files[0].name} and {files[1].name}; keep one")
    lists = {part: _List(files[0], images) for part, files in found.items()}
    lists["train"].choose_columns(image, label)
    for part in [part for part in lists if part != "train"]:
        if label is None and not lists[part].has_column_of(lists["train"]):
            notes.append(f"{lists.pop(part).file.name} has no column of labels and was not used")
        else:
            lists[part].choose_columns(image, label)
    texts = {part: listed.labels() for part, listed in lists.items()}
    read = _numbers if all(_are_numbers(found) for found in texts.values()) else list
    cells = {part: [Cells(str(listed.file), read(texts[part]))] for part, listed in lists.items()}
    classes, labels = read_labels(cells, lists["train"].label_column)
    if images.in_folders():
        notes.append(f"labels are those of {', '.join(listed.file.name for listed in lists.values())}")
    parts = {part: _part(listed, labels[part], root, classes, notes) for part, listed in lists.items()}
    _refuse_contradictions(parts, classes, {part: listed.file.name for part, listed in lists.items()})
    divided: Mapping[str, ListPart | SelectedPart] = parts
    if len(parts) == 1:
        divided, more = _divide(lists["train"], parts["train"])
        notes += more
    notes += [note for listed in lists.values() for note in listed.notes]
    notes += _case_notes(classes)
    notes += _unlisted_notes(images, parts.values())
    return Source(classes, divided["train"], divided.get("val"), divided.get("test"), notes=tuple(notes))


@dataclass(frozen=True)
class ListPart(FolderPart):
    """A part whose images and labels are in a list."""

    file: Path
    kept: Rows
    """The rows of the list that are left without repetitions ``(N,)``."""

    def stamp(self) -> str:
        """Digest the states of the list and of the images."""
        return stamp_of((self.file, *self.files))


def _lists_in(root: Path) -> dict[str, list[Path]]:
    """Find the list of each part; a single list for all parts stands for the training part."""
    try:
        files = sorted(f for f in root.iterdir() if f.suffix.lower() in _FOLDER_SUFFIXES and f.is_file())
    except OSError:
        return {}
    parts: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        if part := part_called(file.stem):
            parts[part].append(file)
    if "train" in parts:
        return {part: parts[part] for part in ("train", "val", "test") if part in parts}
    single = [file for name in _LISTS for file in files if file.stem.lower() == name]
    return {"train": single[:1]} if single else {}


class _Images:
    """The files below a folder, found by what lists call them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def files(self) -> list[PurePosixPath]:
        """Paths within the root, in order; hidden ones are left out, links to folders followed at the top only."""
        found = []
        try:
            tops = sorted(self.root.iterdir())
        except OSError as error:
            raise TaskError(f"the folder {self.root} cannot be listed: {error.strerror}") from error
        for top in tops:
            if is_hidden(top.name):
                continue
            if not top.is_dir():
                found.append(PurePosixPath(top.name))
                continue
            for place, folders, files in os.walk(top):
                inner = PurePosixPath(Path(place).relative_to(self.root).as_posix())
                found += [inner / name for name in files if not is_hidden(name)]
                folders[:] = [name for name in folders if not is_hidden(name)]
        return sorted(found)

    @cached_property
    def pictures(self) -> list[PurePosixPath]:
        return [file for file in self.files if file.suffix.lower() in SUFFIXES]

    def in_folders(self) -> bool:
        """Whether the pictures lie in several folders that are not called as parts are."""
        return len({file.parent for file in self.pictures if part_called(file.parent.name) is None}) > 1

    def find(self, name: str, preferred: str) -> PurePosixPath | None:
        """Find the file that a list calls ``name``; None if there is none.

        A name may lack the folders above it and the suffix. Of several files, one directly below the root, a folder
        ``preferred`` or the folder ``images`` counts.

        Raises:
            TaskError: Several files have the name.
        """
        parts = [_key(part) for part in name.split("/") if part not in ("", ".")]
        if not parts or ".." in parts:
            return None
        candidates = self._by_name.get(parts[-1]) or self._by_stem.get(parts[-1]) or []
        matching = [file for file in candidates if [_key(part) for part in file.parts[-len(parts) : -1]] == parts[:-1]]
        for place in ((), (_key(preferred),), ("images",)):
            nearest = [file for file in matching if tuple(map(_key, file.parts[: -len(parts)])) == place]
            if len(nearest) == 1:
                return nearest[0]
        exact = [file for file in matching if str(file).endswith(name)]
        matching = exact if len(exact) == 1 else matching
        if len(matching) > 1:
            raise TaskError(
                f"'{name}' may be {matching[0]} or {matching[1]} below {self.root}; write the folder and the suffix in "
                "the list"
            )
        return matching[0] if matching else None

    @cached_property
    def _by_name(self) -> dict[str, list[PurePosixPath]]:
        return _grouped((_key(file.name), file) for file in self.files)

    @cached_property
    def _by_stem(self) -> dict[str, list[PurePosixPath]]:
        return _grouped((_key(file.stem), file) for file in self.pictures)


class _List:
    """One list, of which the columns are known once they have been chosen."""

    def __init__(self, file: Path, images: _Images) -> None:
        self.file, self.images = file, images
        self.notes: list[str] = []
        text, note = _decode(file)
        if note:
            self.notes.append(note)
        self._rows, self._lines = _split(text, file)
        self._header = self._find_header()
        if self._header is None:
            self.columns = [str(number + 1) for number in range(max(map(len, self._rows), default=0))]
        else:
            self.columns = self._rows.pop(self._header)
            self._lines.pop(self._header)
        self._image = self._label = -1
        self._above = 0  # folders at the beginning of absolute names that are not those of this machine

    def finds_images(self) -> bool:
        """Whether some image of the first rows is there."""
        return any(map(self._hits, range(len(self.columns))))

    def names_labels(self) -> bool:
        """Whether a column is called as labels usually are, or the list has no header and several columns."""
        if self._header is None:
            return len(self.columns) > 1
        return any(_plain(name) in LABEL_NAMES for name in self.columns)

    def has_column_of(self, other: "_List") -> bool:
        """Whether the column of labels of another list is here too, as far as the header tells."""
        if self._header is None:
            return len(self.columns) > 1
        if self.names_labels() and (other._header is None or other.names_labels()):
            return True
        return other._header is not None and _plain(other.label_column) in map(_plain, self.columns)

    @property
    def label_column(self) -> str:
        """The name of the column of labels, once it has been chosen."""
        return self.columns[self._label]

    def choose_columns(self, image: str | None, label: str | None) -> None:
        """Settle which columns hold names and labels.

        Raises:
            TaskError: They cannot be told, a row lacks one of them, or no image is there.
        """
        for column in (image, label):
            if column is not None:
                require(column, self.columns, str(self.file))
        if not self._rows:
            raise TaskError(f"{self.file} holds nothing: no row with the name of an image and a label")
        self._image = self._image_column() if image is None else self.columns.index(image)
        self._above = self._folders_above()
        self._refuse_none_there()
        self._label = self.columns.index(self._label_column() if label is None else label)
        for row, line in zip(self._rows, self._lines, strict=True):
            if max(self._image, self._label) >= len(row) or not _parts(row[self._image]):
                raise TaskError(
                    f"{self.file}, line {line}: '{' '.join(row)[:60]}' is no file name and label; write both, or "
                    "remove the line"
                )
            if ".." in _parts(row[self._image]):  # it could lead anywhere
                raise TaskError(f"{self.file}, line {line}: '{row[self._image]}' leads out of {self.images.root}")

    def _refuse_none_there(self) -> None:
        names = [name for name in self._column(self._image) if name]
        if names and not any(".." in _parts(name) or self._find(name) for name in names):
            raise TaskError(
                f"none of the {len(names)} images that {self.file} lists in column '{self.columns[self._image]}' is "
                f"below {self.images.root}; the first is '{names[0]}'. Put the images there, or name the column of "
                "their names with @image=COLUMN"
            )

    def names(self) -> list[str]:
        """Return the names as they are written."""
        return [row[self._image] for row in self._rows]

    def labels(self) -> list[str]:
        """Return the labels as they are written."""
        return self._column(self._label)

    def files(self) -> list[PurePosixPath]:
        """Return the file of each row within the root, which may not be there."""
        return [self._find(name) or PurePosixPath(*self._below(name)) for name in self.names()]

    def line(self, row: int) -> int:
        """Return the line of a row in the file, from 1."""
        return self._lines[row]

    def parts(self) -> list[str] | None:
        """Return the part that each row says, or None where there is no column of parts."""
        column = choose_part([name for place, name in enumerate(self.columns) if place != self._label])
        return None if column is None or self._header is None else self._column(self.columns.index(column))

    def _column(self, place: int) -> list[str]:
        return [row[place] if place < len(row) else "" for row in self._rows]

    def _find_header(self) -> int | None:
        """Return 0 if the first row names the columns, else None."""
        if not self._rows:
            return None
        first = self._rows[0]
        if any(self._is_there(cell) or PurePosixPath(cell).suffix.lower() in SUFFIXES for cell in first):
            return None
        if {*map(_plain, first)} & {*_IMAGE_NAMES, *LABEL_NAMES}:
            return 0
        # An image that is missing looks like a header too, unless its label occurs again.
        below = self._rows[1:]
        again = any(
            cell and cell in (row[place] for row in below if place < len(row)) for place, cell in enumerate(first)
        )
        return None if again or not below else 0

    def _image_column(self) -> int:
        def likelihood(place: int) -> tuple[bool, int, int, int]:
            name, hits = _plain(self.columns[place]), self._hits(place)
            usual = -_IMAGE_NAMES.index(name) if name in _IMAGE_NAMES else -len(_IMAGE_NAMES)
            return name not in LABEL_NAMES and hits > 0, usual, hits, len(set(self._column(place)))

        return max(range(len(self.columns)), key=likelihood)

    def _label_column(self) -> str:
        others = [name for place, name in enumerate(self.columns) if place != self._image]
        if len(others) == 1 and choose_part(others) is None:
            return others[0]  # a list of names has nothing else to say of them
        columns = [Column(name, "text") for name in others]

        def read(column: str) -> dict[str, list[Cells]]:
            found = self._column(self.columns.index(column))
            return {"train": [Cells(str(self.file), _numbers(found) if _are_numbers(found) else found)]}

        return choose_label(columns, self.columns, str(self.file), read)

    def _hits(self, place: int) -> int:
        """Count the first rows of which a column names a file that is there."""
        return sum(map(self._is_there, self._column(place)[:_LOOKED_AT]))

    def _is_there(self, cell: str) -> bool:
        """Whether a cell names a picture, with any of the folders at its beginning left out if it is absolute."""
        parts = _parts(cell)
        cuts = range(len(parts)) if _is_absolute(cell) else [0]
        return any(self._exists("/".join(parts[cut:])) for cut in cuts)

    def _exists(self, name: str) -> bool:
        try:
            found = self.images.find(name, self.file.stem)
        except TaskError:  # several
            return True
        return found is not None and found != PurePosixPath(self.file.name)

    def _folders_above(self) -> int:
        """Find how many folders of absolute names are above the root, by the first rows."""
        names = [_parts(name) for name in self._column(self._image)[:_LOOKED_AT] if _is_absolute(name)]
        cuts = (
            next((cut for cut in range(len(parts)) if self._exists("/".join(parts[cut:]))), None) for parts in names
        )
        counted = Counter(cut for cut in cuts if cut is not None)
        return counted.most_common(1)[0][0] if counted else 0

    def _below(self, name: str) -> list[str]:
        return _parts(name)[self._above if _is_absolute(name) else 0 :]

    def _find(self, name: str) -> PurePosixPath | None:
        return self.images.find("/".join(self._below(name)), self.file.stem)


def _part(listed: _List, labels: Rows, root: Path, classes: Sequence[str], notes: list[str]) -> ListPart:
    """Make a part of a list, with each image once."""
    seen: dict[PurePosixPath, int] = {}
    kept = []
    for row, file in enumerate(listed.files()):
        first = seen.setdefault(file, row)
        if labels[first] != labels[row]:
            raise TaskError(
                f"{listed.file} contradicts itself: {file} is '{classes[labels[first]]}' in line {listed.line(first)} "
                f"and '{classes[labels[row]]}' in line {listed.line(row)}; remove one"
            )
        if first == row:
            kept.append(row)
    repeated = len(labels) - len(kept)
    if repeated:
        notes.append(f"{repeated} rows of {listed.file.name} repeat others and were left out")
    rows = np.array(kept, dtype=np.int64)
    return ListPart(labels[rows], tuple(root / file for file in seen), root, listed.file, rows)


def _refuse_contradictions(parts: Mapping[str, ListPart], classes: Sequence[str], lists: Mapping[str, str]) -> None:
    said: dict[Path, tuple[str, int]] = {}
    for part, found in parts.items():
        for file, label in zip(found.files, found.labels.tolist(), strict=True):
            other, before = said.setdefault(file, (lists[part], label))
            if before != label:
                raise TaskError(
                    f"{other} and {lists[part]} contradict each other: {file} is '{classes[before]}' in the one and "
                    f"'{classes[label]}' in the other; remove one"
                )


def _divide(listed: _List, part: ListPart) -> tuple[Mapping[str, ListPart | SelectedPart], list[str]]:
    said = listed.parts()
    if said is None:
        return {"train": part}, []
    column = choose_part([name for name in listed.columns]) or ""
    rows, notes = rows_of_parts([said[row] for row in part.kept.tolist()], column, listed.file.name)
    return {name: SelectedPart(part, chosen) for name, chosen in rows.items()}, list(notes)


def _unlisted_notes(images: _Images, parts: Iterable[ListPart]) -> list[str]:
    listed = {file for part in parts for file in part.files}
    unlisted = [file for file in images.pictures if images.root / file not in listed]
    if not unlisted:
        return []
    return [f"{len(unlisted)} images are in no list and were not used: {_some(map(str, unlisted))}"]


def _case_notes(classes: Sequence[str]) -> list[str]:
    alike = _grouped((_key(name), name) for name in classes)
    return [
        f"labels {' and '.join(map(repr, names))} differ in case or accents only, and are different classes"
        for names in alike.values()
        if len(names) > 1
    ]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _decode(file: Path) -> tuple[str, str | None]:
    """Read a text in whichever of the usual encodings it is; returns a note where that had to be guessed.

    Raises:
        TaskError: It cannot be read, or is no text.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise TaskError(f"{file} cannot be read: {error.strerror}") from error
    encoding, note = _encoding(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise TaskError(f"{file} is no text in {encoding} ({error}); save it as UTF-8") from error
    if "\0" in text:
        raise TaskError(f"{file} is no text: it holds null bytes; save the list as CSV in UTF-8")
    return text, note and f"{file.name} is not UTF-8 and was read as {note}"


def _encoding(content: bytes) -> tuple[str, str | None]:
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
    """Split a list into cells without the blanks around them; returns the rows that hold any, and their lines.

    Raises:
        TaskError: A quotation mark is not closed, or a cell is too long.
    """
    separators = _SEPARATORS
    if said := re.match(r"sep=(.)\s*\n", text):  # Excel's way to say it
        separators, text = said[1], "\n" + text[said.end() :]
    tables, errors = [], []
    for separator in separators:
        try:
            tables.append(_cells(text, separator, file))
        except TaskError as error:  # which may be due to a wrong separator
            errors.append(error)
    best = max(tables, key=lambda table: _likelihood(table[0]), default=None)
    if best is None or (errors and _likelihood(best[0])[2] < 2):
        raise errors[0]
    return best


def _cells(text: str, separator: str, file: Path) -> tuple[list[list[str]], list[int]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    rows, lines = [], []
    try:
        for row in reader:
            cells = [cell.strip().removeprefix("\ufeff") for cell in row]
            if any("\n" in cell or "\r" in cell for cell in cells):
                raise TaskError(f"{file}, line {reader.line_num}: a quotation mark before it is not closed")
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                rows.append(cells)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise TaskError(f"{file}, line {reader.line_num}, cannot be read: {error}") from error
    return rows, lines


def _likelihood(rows: Sequence[Sequence[str]]) -> tuple[bool, float, int]:
    """Order separators: the header is understood, rows have equally many cells and more than one, cells are many."""
    if not rows:
        return False, 0.0, 0
    cells = Counter(map(len, rows)).most_common(1)[0]
    understood = bool({*map(_plain, rows[0])} & {*_IMAGE_NAMES, *LABEL_NAMES}) and len(rows[0]) > 1
    return understood, cells[1] / len(rows) if cells[0] > 1 else 0.0, cells[0]


def _are_numbers(values: Sequence[str]) -> bool:
    """Whether all texts are plainly written numbers, as ``7`` or ``7.0``; not ``007``."""
    return all(re.fullmatch(r"-?(0|[1-9][0-9]{0,8})(\.[0-9]+)?", value) for value in values)


def _numbers(values: Sequence[str]) -> list[str | int | float]:
    return [float(value) if "." in value else int(value) for value in values]


def _parts(name: str) -> list[str]:
    """Take the path that a list gives apart, whichever system wrote it."""
    return [part for part in re.split(r"[/\\]", re.sub("^[A-Za-z]:", "", name)) if part not in ("", ".")]


def _is_absolute(name: str) -> bool:
    return bool(re.match(r"[/\\]|[A-Za-z]:[/\\]", name))


def _plain(name: str) -> str:
    return re.sub(r"[\s_.-]+", "_", name.strip().casefold())


def _key(name: str) -> str:
    """Write a name as file systems compare it that know neither case nor ways to write accents."""
    return unicodedata.normalize("NFC", name).casefold()


def _grouped(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return dict(groups)
