"""Folders of images, one folder per class."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refilled.data.several import Several
from refilled.data.source import Part, Picture, Rows, Source, part_called, stamp_of
from refilled.data.walking import (
    Listing,
    as_text,
    fold_name,
    has_images,
    list_folders,
    list_images,
    loose_files,
    unread_notes,
)
from refilled.errors import TaskError
from refilled.words import count_of

_SHOWN = 5  # names in a message
_DESCRIPTIONS = frozenset({".json", ".txt", ".csv", ".md", ".toml", ".yaml", ".html", ""})


def open_image_folder(root: Path) -> Source:
    """Open ``root/CLASS/.../IMAGE`` or ``root/{train,val,test}/CLASS/.../IMAGE``.

    The folder has parts if it contains a folder for training that itself contains folders. Parts may have any of the
    usual names (``training_set``, ``valid``, ``dev``, ...). Every other folder directly below the root or below a part
    is a class, whatever its name. Classes and images are sorted by name.

    Raises:
        TaskError: There are no class folders, the layout is ambiguous or one level too high or too deep, a folder
            cannot be listed, or two names differ only in case.
    """
    layout, notes = _layout_of(root)
    classes = sorted({name for folders in layout.values() for name in folders})
    if not classes:
        raise TaskError(f"{root} has no class folders; put the images of each class into a folder named after it")
    _refuse_collisions(classes, root)
    unread: Counter[str] = Counter()
    ignored = _loose(root, layout)
    parts = {}
    for part, folders in layout.items():
        listings = {name: list_images(folder) for name, folder in folders.items()}
        ignored += [path for listing in listings.values() for path in listing.ignored]
        unread.update(sum((listing.unread for listing in listings.values()), Counter()))
        parts[part] = _part_of(listings, classes, root)
    if not len(parts["train"].labels):
        raise TaskError("; ".join([f"no images were found in the class folders of {root}", *unread_notes(unread)]))
    return Source(
        tuple(classes),
        parts["train"],
        parts.get("val"),
        parts.get("test"),
        notes=(*notes, *unread_notes(unread)),
        ignored=Several.of(ignored, lambda path: as_text(path.relative_to(root))),
    )


def _loose(root: Path, layout: Mapping[str, Mapping[str, Path]]) -> list[Path]:
    """Return the files beside the class folders, which belong to no class, but not those that describe a data set."""
    folders = {root, *(folder.parent for folders in layout.values() for folder in folders.values())}
    found = [path for folder in sorted(folders) for path in loose_files(folder)]
    return [path for path in found if path.suffix.lower() not in _DESCRIPTIONS]


def _part_of(listings: Mapping[str, Listing], classes: list[str], root: Path) -> Part:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = listings[name].images if name in listings else []
        files += images
        labels += [label] * len(images)
    return FolderPart(np.array(labels, dtype=np.int64), tuple(files), root)


def open_loose_images(root: Path) -> "FolderPart":
    """Return the images of a folder at any depth, sorted by name, without hidden ones, with label 0.

    Raises:
        TaskError: A folder cannot be listed.
    """
    files = tuple(list_images(root).images)
    return FolderPart(np.zeros(len(files), dtype=np.int64), files, root)


@dataclass(frozen=True)
class FolderPart:
    """A part of a folder of images: the files of all classes, class after class."""

    labels: Rows
    files: tuple[Path, ...]
    root: Path

    def name(self, row: int) -> str:
        """Return the name of an image: its path relative to the folder."""
        return as_text(self.files[row].relative_to(self.root))

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Return the files of these rows."""
        return (self.files[row] for row in rows)

    def stamp(self) -> str:
        """Return a digest of the states of the files."""
        return stamp_of(self.files)


def _layout_of(root: Path) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Return the class folders of each part by name, and notes on folders that are not used."""
    folders = list_folders(root)
    named: dict[str, list[Path]] = {}
    for folder in folders:
        part = part_called(folder.name)
        if part is not None:
            named.setdefault(part, []).append(folder)
    if any(list_folders(folder) for folder in named.get("train", ())):
        return _with_parts(root, folders, named)
    _refuse_parts_as_classes(root, folders, named)
    _refuse_wrong_level(root, folders)
    return {"train": _classes_in(root)}, []


def _with_parts(
    root: Path, folders: list[Path], named: dict[str, list[Path]]
) -> tuple[dict[str, dict[str, Path]], list[str]]:
    layout, notes = {}, []
    for part, candidates in named.items():
        if len(candidates) > 1:
            raise TaskError(
                f"{root} has {len(candidates)} folders for the {part} part: {_listed(candidates)}; keep one of them"
            )
        (folder,) = candidates
        classes = _classes_in(folder)
        if classes and any(list_images(c).images for c in classes.values()):
            layout[part] = classes
            _refuse_wrong_level(folder, list(classes.values()))
            continue
        count = len(list_images(folder).images)
        why = f"its {count_of(count, 'image has', 'images have')} no labels" if count else "it is empty"
        notes.append(f"{folder.name} is not used: it has no class folders with images, so {why}")
    if "train" not in layout:
        raise TaskError(f"no images were found in the class folders of {named['train'][0]}")
    unused = [folder for folder in folders if part_called(folder.name) is None]
    if unused:
        notes.append(f"folders next to {named['train'][0].name} that are not used: {_listed(unused)}")
    return layout, notes


def _refuse_parts_as_classes(root: Path, folders: list[Path], named: dict[str, list[Path]]) -> None:
    words = [folder for candidates in named.values() for folder in candidates]
    if len(words) < 2 or len(words) < len(folders):
        return
    if any(list_folders(folder) for folder in words):
        raise TaskError(
            f"{root} has the parts {_listed(words)}, but none named train with class folders; name the training "
            "part train"
        )
    raise TaskError(
        f"{_listed(words)} in {root} are named after parts, but have no class folders; put the images of each class "
        "into a folder named after it, inside each part"
    )


def _refuse_wrong_level(root: Path, folders: list[Path]) -> None:
    """Raise a :class:`TaskError` if the data set or its classes lie one level deeper."""
    if any(has_images(folder) for folder in folders):
        return
    below = [[inner.name for inner in list_folders(folder)] for folder in folders]
    if len(folders) == 1 and len(below[0]) > 1:
        raise TaskError(
            f"{root} contains only one folder, '{folders[0].name}', which contains others; give {folders[0]} instead"
        )
    if len(folders) > 1 and len(below[0]) > 1 and all(names == below[0] for names in below):
        shown = ", ".join(f"'{name}'" for name in below[0][:_SHOWN])
        raise TaskError(
            f"the folders of {root} ({_listed(folders)}) all contain the same folders ({shown}), so it is unclear "
            "which are the classes; put the class folders directly below the root, or below train, val and test"
        )


def _classes_in(root: Path) -> dict[str, Path]:
    folders = list_folders(root)
    for folder in folders:
        if as_text(folder) != str(folder):
            raise TaskError(f"the path of the class folder {as_text(folder)} is not valid UTF-8; rename it")
    return {folder.name: folder for folder in folders}


def _listed(folders: list[Path]) -> str:
    return str(Several.of(folders, lambda folder: folder.name))


def _refuse_collisions(classes: list[str], root: Path) -> None:
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(fold_name(name), name)
        if other != name:
            raise TaskError(
                f"the class folders '{other}' and '{name}' of {root} differ only in case or the encoding of accents, "
                "which some file systems ignore; merge or rename them"
            )
