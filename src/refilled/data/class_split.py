"""Divide classes for few-shot learning: seen classes to train on, val to tune on, unseen to test on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from refilled.data.source import Part, Source
from refilled.data.transforms import Augmentation
from refilled.errors import TaskError, unknown

Side = Literal["seen", "val", "unseen"]
SIDES: tuple[Side, ...] = get_args(Side)
BESIDE = "split.json"  # default name of a split next to the images
_OTHER_NAMES = {"seen": "train", "unseen": "test"}  # other usual names


@dataclass(frozen=True)
class ClassSplit:
    """Positions of the seen, val and unseen classes, ascending, and defaults for their images."""

    seen: tuple[int, ...]
    val: tuple[int, ...]
    unseen: tuple[int, ...]
    image_size: int | None = None
    augmentation: Augmentation | None = None


def list_splits() -> list[str]:
    """Return the names of the splits that come with the package."""
    return sorted(file.name.removesuffix(".json") for file in _folder().iterdir())


def split_classes(source: Source, known_as: str, folder: Path | None, name: str | None = None) -> ClassSplit:
    """Return which classes of a source are seen, val and unseen.

    The first of these that exists is used:

    * the split called ``name``, of the package or in a JSON file next to the images;
    * ``split.json`` next to the images;
    * the split of the package with the name of the source;
    * the source's parts train, val and test, if no class has images in two of them.

    A split is ``{"seen": [...], "val": [...], "unseen": [...]}`` with names of classes, or patterns such as
    ``"Greek/*"``. ``val`` is optional and only needed for tuning.

    Args:
        source: The source.
        known_as: The name of the source.
        folder: The folder of its images. None: the source is not a folder of the user.
        name: The name of the split, or None.

    Raises:
        TaskError: There is no split, or it does not match the classes.
    """
    if name is not None:
        return _fit(_named(name, folder), source, name)
    if folder is not None and (folder / BESIDE).is_file():
        return _fit(_read(folder / BESIDE), source, str(folder / BESIDE))
    if known_as in list_splits():
        return _fit(_read(_folder() / f"{known_as}.json"), source, known_as)
    if parts_share_no_class(source):
        seen, val, unseen = (tuple(sorted(_present(part))) for part in (source.train, source.val, source.test))
        return ClassSplit(seen, val, unseen)
    own = (
        ""
        if folder is None
        else f'write {folder / BESIDE} as {{"seen": ["cat", ...], "val": [...], "unseen": [...]}}, or '
    )
    raise TaskError(
        f"{known_as} has no split into seen and unseen classes: {own}name a split, as in {known_as}@split=NAME "
        f"({', '.join(list_splits())})"
    )


def parts_share_no_class(source: Source) -> bool:
    """Return whether there are several parts and no class has images in two of them."""
    present = [classes for part in (source.train, source.val, source.test) if (classes := _present(part))]
    return len(present) > 1 and sum(map(len, present)) == len(set().union(*present))


def _present(part: Part | None) -> set[int]:
    return set() if part is None else set(np.unique(part.labels).tolist())


def _folder() -> Any:
    return files("refilled.data") / "splits"


def _named(name: str, folder: Path | None) -> Mapping[str, Any]:
    if name in list_splits():
        return _read(_folder() / f"{name}.json")
    if folder is not None and (folder / name).is_file():
        return _read(folder / name)
    nor = "" if folder is None else f"; and there is no file {folder / name}"
    raise TaskError(unknown("split", name, list_splits()) + nor)


def _read(path: Any) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TaskError(f"the split {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise TaskError(f'the split {path} must be {{"seen": [...], "val": [...], "unseen": [...]}}')
    return content


def _fit(content: Mapping[str, Any], source: Source, where: str) -> ClassSplit:
    """Return the split of a source from the names in a file."""
    sides = {side: _listed(content, side, where) for side in SIDES}
    positions = {side: _positions(names, source.classes, where) for side, names in sides.items()}
    owner: dict[int, str] = {}
    for side, chosen in positions.items():
        for position in chosen:
            other = owner.setdefault(position, side)
            if other != side:
                raise TaskError(f"the split {where} has class '{source.classes[position]}' in both {other} and {side}")
    for side in ("seen", "unseen"):
        if not positions[side]:
            raise TaskError(f"the split {where} names no {side} classes")
    size, kind = content.get("image_size"), content.get("augmentation")
    if kind not in (None, *get_args(Augmentation)):
        raise TaskError(f"the split {where}: {unknown('augmentation', str(kind), get_args(Augmentation))}")
    if size is not None and not (isinstance(size, int) and 1 <= size <= 4096):
        raise TaskError(f"the split {where} has an image_size of {size!r} pixels; give 1 to 4096")
    seen, val, unseen = (tuple(sorted(positions[side])) for side in SIDES)
    return ClassSplit(seen, val, unseen, size, kind)


def _listed(content: Mapping[str, Any], side: str, where: str) -> list[str]:
    names = content.get(side, content.get(_OTHER_NAMES.get(side, side), []))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TaskError(f"the split {where} must list the names of the {side} classes as text")
    return names


def _positions(names: Sequence[str], classes: Sequence[str], where: str) -> set[int]:
    known = {name: position for position, name in enumerate(classes)}
    positions: set[int] = set()
    for name in names:
        matches = {known[name]} if name in known else {p for c, p in known.items() if fnmatchcase(c, name)}
        if not matches:
            raise TaskError(f"the split {where}: {unknown('class', name, classes)}")
        positions |= matches
    return positions
