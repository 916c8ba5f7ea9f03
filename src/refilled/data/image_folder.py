"""Folders of images, one folder a class."""

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refilled.data.decode import SUFFIXES
from refilled.data.parquet import PART_NAMES
from refilled.data.source import Picture, Rows, Source
from refilled.errors import TaskError


def open_image_folder(root: Path) -> Source:
    """Open ``root/CLASS/.../IMAGE`` or ``root/{train,val,test}/CLASS/.../IMAGE``.

    The folder has parts if it holds a folder ``train`` that itself holds folders. Classes and images come in the order
    of their names. Hidden files and files without the suffix of an image are passed over; a folder named like an image
    is listed as skipped.

    Raises:
        TaskError: There are no class folders, a folder cannot be listed, or two names differ in case only.
    """
    roots = _part_roots(root)
    found = {part: _list_classes(folder) for part, folder in roots.items()}
    classes = sorted({name for listed in found.values() for name in listed})
    if not classes:
        raise TaskError(f"{root} has no class folders; put the images of each class into a folder named after it")
    _refuse_collisions(classes, root)
    skipped: list[tuple[str, str]] = []
    parts = {}
    for part, listed in found.items():
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            images = list(_list_images(listed[name], root, skipped)) if name in listed else []
            files += images
            labels += [label] * len(images)
        parts[part] = FolderPart(np.array(labels, dtype=np.int64), tuple(files), root)
    return Source(tuple(classes), parts["train"], parts.get("val"), parts.get("test"), skipped=tuple(skipped))


@dataclass(frozen=True)
class FolderPart:
    """A part of a folder of images: the files of all its classes, class after class."""

    labels: Rows
    files: tuple[Path, ...]
    root: Path

    def name(self, row: int) -> str:
        """Say where an image came from: its path within the folder."""
        return _printable(self.files[row].relative_to(self.root))

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Give the files of these rows."""
        return (self.files[row] for row in rows)


def _part_roots(root: Path) -> dict[str, Path]:
    folders = _list_folders(root)
    named = {PART_NAMES[folder.name.lower()]: folder for folder in folders if folder.name.lower() in PART_NAMES}
    if "train" in named and _list_folders(named["train"]):
        return named
    return {"train": root}


def _list_folders(root: Path) -> list[Path]:
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise TaskError(f"the folder {root} cannot be listed: {error.strerror}") from None
    return [entry for entry in entries if entry.is_dir() and not _is_hidden(entry.name)]


def _list_classes(root: Path) -> dict[str, Path]:
    folders = [folder for folder in _list_folders(root) if folder.suffix.lower() not in SUFFIXES]
    for folder in folders:
        if _printable(folder) != str(folder):
            raise TaskError(f"the name of the class folder {_printable(folder)} is not valid UTF-8; rename it")
    return {folder.name: folder for folder in folders}


def _list_images(folder: Path, root: Path, skipped: list[tuple[str, str]]) -> Iterator[Path]:
    """Walk down a class folder in the order of names; links to folders are not followed, so there are no loops."""

    def unlisted(error: OSError) -> None:
        skipped.append(
            (_printable(Path(error.filename).relative_to(root)), f"folder cannot be listed: {error.strerror}")
        )

    for place, folders, files in os.walk(folder, onerror=unlisted):
        named_like_images = sorted(name for name in folders if Path(name).suffix.lower() in SUFFIXES)
        skipped += [(_printable((Path(place) / name).relative_to(root)), "a directory") for name in named_like_images]
        folders[:] = sorted(name for name in folders if not _is_hidden(name) and name not in named_like_images)
        for name in sorted(files):
            if Path(name).suffix.lower() in SUFFIXES and not _is_hidden(name):
                yield Path(place) / name


def _refuse_collisions(classes: list[str], root: Path) -> None:
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise TaskError(
                f"the class folders '{other}' and '{name}' of {root} differ in case or the encoding of accents only, "
                "which some file systems cannot tell apart; merge or rename them"
            )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _printable(path: Path) -> str:
    """Write a path as text that any file can hold, also one whose name is not valid UTF-8."""
    return str(path).encode(errors="backslashreplace").decode()
