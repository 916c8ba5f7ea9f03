"""Folders of images, one folder a class."""

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refilled.data.decode import SUFFIXES
from refilled.data.source import PART_NAMES, Picture, Rows, Source, stamp_of
from refilled.errors import TaskError


def open_image_folder(root: Path) -> Source:
    """Open ``root/CLASS/.../IMAGE`` or ``root/{train,val,test}/CLASS/.../IMAGE``.

    The folder has parts if it holds a folder ``train`` that itself holds folders. Classes and images come in the order
    of their names. Hidden files and files without the suffix of an image are passed over. A folder named like an image
    counts as one, which will turn out unreadable.

    Raises:
        TaskError: There are no class folders, a folder cannot be listed, or two names differ in case only.
    """
    roots = _part_roots(root)
    found = {part: _list_classes(folder) for part, folder in roots.items()}
    classes = sorted({name for listed in found.values() for name in listed})
    if not classes:
        raise TaskError(f"{root} has no class folders; put the images of each class into a folder named after it")
    _refuse_collisions(classes, root)
    parts = {}
    for part, listed in found.items():
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            images = list(_list_images(listed[name])) if name in listed else []
            files += images
            labels += [label] * len(images)
        parts[part] = FolderPart(np.array(labels, dtype=np.int64), tuple(files), root)
    return Source(tuple(classes), parts["train"], parts.get("val"), parts.get("test"))


def open_loose_images(root: Path) -> "FolderPart":
    """Find all images of a folder at any depth, in the order of their names; what is hidden is passed over.

    Raises:
        TaskError: A folder cannot be listed.
    """
    files = tuple(_list_images(root))
    return FolderPart(np.zeros(len(files), dtype=np.int64), files, root)


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

    def stamp(self) -> str:
        """Digest the states of the files."""
        return stamp_of(self.files)


def _part_roots(root: Path) -> dict[str, Path]:
    folders = _list_folders(root)
    named = {PART_NAMES[folder.name.lower()]: folder for folder in folders if folder.name.lower() in PART_NAMES}
    if "train" in named and _list_folders(named["train"]):
        return named
    return {"train": root}


def _list_folders(root: Path) -> list[Path]:
    try:
        return [entry for entry in sorted(root.iterdir()) if entry.is_dir() and not _is_hidden(entry.name)]
    except OSError as error:
        raise _unlistable(error) from None


def _list_classes(root: Path) -> dict[str, Path]:
    folders = [folder for folder in _list_folders(root) if not _is_image(folder.name)]
    for folder in folders:
        if _printable(folder) != str(folder):
            raise TaskError(f"the path of the class folder {_printable(folder)} is not valid UTF-8; rename it")
    return {folder.name: folder for folder in folders}


def _list_images(folder: Path) -> Iterator[Path]:
    """Walk down a class folder in the order of names; links to folders are not followed, so there are no loops."""

    def refuse(error: OSError) -> None:
        raise _unlistable(error)

    for place, folders, files in os.walk(folder, onerror=refuse):
        yield from (Path(place) / name for name in sorted(files + folders) if _is_image(name))
        folders[:] = sorted(name for name in folders if not _is_image(name) and not _is_hidden(name))


def _unlistable(error: OSError) -> TaskError:
    return TaskError(f"the folder {_printable(Path(error.filename))} cannot be listed: {error.strerror}")


def _refuse_collisions(classes: list[str], root: Path) -> None:
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise TaskError(
                f"the class folders '{other}' and '{name}' of {root} differ in case or the encoding of accents only, "
                "which some file systems cannot tell apart; merge or rename them"
            )


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _printable(path: Path) -> str:
    """Write a path as text that any file can hold, also one whose name is not valid UTF-8."""
    return str(path).encode(errors="backslashreplace").decode()
