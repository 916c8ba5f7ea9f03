"""Lists of images and labels next to the images: ``labels.csv``, or ``train.csv``, ``val.csv`` and ``test.csv``.

The usual variants of such lists are read: any common encoding and delimiter, with or without a header, and names with
or without their folder or suffix, in the path notation of any operating system. Images are searched below one folder
only, whatever their names say.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from refilled.data.source import Rows, SelectedPart, Source, part_called, stamp_of
from refilled.data.sources.columns import Cells, read_labels, rows_of_parts
from refilled.data.sources.image_folder import FolderPart
from refilled.data.sources.image_list import ImageList
from refilled.data.sources.list_text import are_numbers, to_numbers
from refilled.data.sources.listed_images import ListedImages, group_by
from refilled.data.walking import fold_name
from refilled.errors import TaskError
from refilled.words import count_of, plural

_SUFFIXES = (".csv", ".tsv", ".txt")
_FOLDER_SUFFIXES = (".csv", ".tsv")  # a .txt next to images may well be a licence
_STEMS = ("labels", "label", "annotations", "metadata", "list", "images", "train_labels", "trainlabels")
"""Usual names of the single list of a folder, without the suffix, in order of preference."""
_SHOWN = 3  # names in a note


def is_csv_folder(root: Path) -> bool:
    """Return whether a folder holds a list that names some of its images and their labels.

    If there are class folders too, only a list with a column such as ``label`` counts. Other lists describe the images.
    """
    files = [file for candidates in _lists_in(root).values() for file in candidates]
    if not files:
        return False
    images = ListedImages(root)
    lists = [image_list for file in files if (image_list := ImageList(file, images)).finds_images()]
    return any(image_list.names_labels() for image_list in lists) or bool(lists and not images.in_folders())


def is_list(path: Path) -> bool:
    """Return whether a path is a file with the suffix of a list."""
    return path.suffix.lower() in _SUFFIXES and path.is_file()


def open_csv_folder(path: Path, image: str | None = None, label: str | None = None) -> Source:
    """Open the lists of a folder, or one list, and the images below the folder.

    ``train.csv``, ``val.csv`` and ``test.csv`` list one part each; ``val.csv`` and ``test.csv`` are optional. The lists
    of MiniImageNet (Ravi and Larochelle, ICLR 2017) have this form. A single list, such as ``labels.csv``, may give the
    part of each image in a column such as ``split``.

    Listed images that do not exist are reported when they are decoded.

    Args:
        path: The folder or the list.
        image: The column of image names. None: found by name and values. The columns of a list without a header are
            called 1, 2, ...
        label: The column of labels. None: found by name, or the only other column.

    Raises:
        TaskError: A list cannot be read, lacks a column, or contradicts itself or another list.
    """
    root = path.parent if path.is_file() else path
    images = ListedImages(root)
    notes: list[str] = []
    files = {"train": [path]} if path.is_file() else _lists_in(path)
    for part, candidates in files.items():
        if len(candidates) > 1:
            raise TaskError(
                f"{root} has two lists of the {part} part, {candidates[0].name} and {candidates[1].name}; keep one"
            )
    lists = {part: ImageList(candidates[0], images) for part, candidates in files.items()}
    lists["train"].choose_columns(image, label)
    for part in [part for part in lists if part != "train"]:
        if label is None and not lists[part].has_label_column_of(lists["train"]):
            notes.append(f"{lists.pop(part).file.name} has no column of labels and was not used")
        else:
            lists[part].choose_columns(image, label)
    texts = {part: image_list.labels() for part, image_list in lists.items()}
    convert = to_numbers if all(map(are_numbers, texts.values())) else list
    cells = {part: [Cells(str(image_list.file), convert(texts[part]))] for part, image_list in lists.items()}
    classes, labels = read_labels(cells, lists["train"].label_column)
    if images.in_folders():
        notes.append(f"labels are those of {', '.join(image_list.file.name for image_list in lists.values())}")
    parts = {part: _part(image_list, labels[part], root, classes, notes) for part, image_list in lists.items()}
    _refuse_contradictions(parts, classes)
    divided: Mapping[str, ListPart | SelectedPart] = parts
    if len(parts) == 1:
        divided, part_notes = _divide(lists["train"], parts["train"])
        notes += part_notes
    notes += [note for image_list in lists.values() for note in image_list.notes]
    notes += _case_notes(classes)
    notes += _unlisted_notes(images, parts.values())
    return Source(classes, divided["train"], divided.get("val"), divided.get("test"), notes=tuple(notes))


@dataclass(frozen=True)
class ListPart(FolderPart):
    """A part whose images and labels come from a list."""

    file: Path
    kept: Rows
    """The rows of the list ``(N,)`` that do not repeat an earlier one."""

    def stamp(self) -> str:
        """Return a digest of the states of the list and of the images."""
        return stamp_of((self.file, *self.files))


def _lists_in(root: Path) -> dict[str, list[Path]]:
    """Return the lists of each part; a single list for all parts is that of the training part."""
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
    single = [file for stem in _STEMS for file in files if file.stem.lower() == stem]
    return {"train": single[:1]} if single else {}


def _part(image_list: ImageList, labels: Rows, root: Path, classes: Sequence[str], notes: list[str]) -> ListPart:
    """Return the part of a list, with each image once."""
    first_row: dict[PurePosixPath, int] = {}
    kept = []
    for row, file in enumerate(image_list.files()):
        first = first_row.setdefault(file, row)
        if labels[first] != labels[row]:
            raise TaskError(
                f"{image_list.file} contradicts itself: {file} is '{classes[labels[first]]}' in line "
                f"{image_list.line(first)} and '{classes[labels[row]]}' in line {image_list.line(row)}; remove one"
            )
        if first == row:
            kept.append(row)
    repeated = len(labels) - len(kept)
    if repeated:
        ending = plural(repeated, "repeats another and was", "repeat others and were")
        notes.append(f"{count_of(repeated, 'row')} of {image_list.file.name} {ending} left out")
    rows = np.array(kept, dtype=np.int64)
    return ListPart(labels[rows], tuple(root / file for file in first_row), root, image_list.file, rows)


def _refuse_contradictions(parts: Mapping[str, ListPart], classes: Sequence[str]) -> None:
    """Raise a :class:`TaskError` if two lists give one image different labels."""
    first: dict[Path, tuple[str, int]] = {}
    for part in parts.values():
        for file, label in zip(part.files, part.labels.tolist(), strict=True):
            other_list, other_label = first.setdefault(file, (part.file.name, label))
            if other_label != label:
                raise TaskError(
                    f"{other_list} and {part.file.name} contradict each other: {file} is '{classes[other_label]}' in "
                    f"the first and '{classes[label]}' in the second; remove one"
                )


def _divide(image_list: ImageList, part: ListPart) -> tuple[Mapping[str, ListPart | SelectedPart], list[str]]:
    """Divide a single list by its column of parts, if it has one; return the parts and notes."""
    names, column = image_list.parts(), image_list.part_column
    if names is None or column is None:
        return {"train": part}, []
    rows, notes = rows_of_parts([names[row] for row in part.kept.tolist()], column, image_list.file.name)
    return {name: SelectedPart(part, chosen) for name, chosen in rows.items()}, list(notes)


def _unlisted_notes(images: ListedImages, parts: Iterable[ListPart]) -> list[str]:
    listed = {file for part in parts for file in part.files}
    unlisted = [file for file in images.pictures if images.root / file not in listed]
    if not unlisted:
        return []
    shown = ", ".join(map(str, unlisted[:_SHOWN])) + (", ..." if len(unlisted) > _SHOWN else "")
    left_out = count_of(len(unlisted), "image is in no list and was", "images are in no list and were")
    return [f"{left_out} not used: {shown}"]


def _case_notes(classes: Sequence[str]) -> list[str]:
    similar = group_by((fold_name(name), name) for name in classes)
    return [
        f"labels {' and '.join(map(repr, names))} differ only in case or accents, and are different classes"
        for names in similar.values()
        if len(names) > 1
    ]
