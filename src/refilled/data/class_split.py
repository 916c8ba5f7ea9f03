"""Few-shot learning divides the classes, not the images: seen ones to learn from, val to tune on, unseen to test on."""

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
BESIDE = "split.json"  # the name of a split beside the images, where none is named
_OTHER_NAMES = {"seen": "train", "unseen": "test"}  # what the field also calls them


@dataclass(frozen=True)
class ClassSplit:
    """Positions of the seen, val and unseen classes, ascending, and what goes with the split."""

    seen: tuple[int, ...]
    val: tuple[int, ...]
    unseen: tuple[int, ...]
    image_size: int | None = None
    augmentation: Augmentation | None = None


def list_splits() -> list[str]:
    """Name the splits that come with the package."""
    return sorted(file.name.removesuffix(".json") for file in _folder().iterdir())


def split_classes(source: Source, known_as: str, folder: Path | None, name: str | None = None) -> ClassSplit:
    """Find out which classes of a source are seen, val and unseen.

    In this order: the split that is named, of the package or a JSON file beside the images; ``split.json`` beside the
    images; the split of the package that is called like the source; and, where no class has images in two of the parts
    train, val and test of the source, these parts.

    A split is ``{"seen": [...], "val": [...], "unseen": [...]}`` with names of classes, or patterns such as
    ``"Greek/*"``. Without ``val`` there is nothing to tune on.

    Args:
        source: The source.
        known_as: What the source is called.
        folder: Where its images lie, if that is a folder of the user's.
        name: The split's name, if it is given.

    Raises:
        TaskError: There is no split, or it does not fit the classes.
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
        f"nothing says which classes of {known_as} are seen and unseen: {own}name a split, as in {known_as}@split=NAME "
        f"({', '.join(list_splits())})"
    )


def parts_share_no_class(source: Source) -> bool:
    """Whether there are several parts and no class has images in two of them."""
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
    """Look the names of a split up among the classes of a source."""
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
        raise TaskError(f"the split {where} asks for images of {size!r} pixels; give 1 to 4096")
    seen, val, unseen = (tuple(sorted(positions[side])) for side in SIDES)
    return ClassSplit(seen, val, unseen, size, kind)


def _listed(content: Mapping[str, Any], side: str, where: str) -> list[str]:
    names = content.get(side, content.get(_OTHER_NAMES.get(side, side), []))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TaskError(f"the split {where} must list the names of the {side} classes as text")
    return names


def _positions(names: Sequence[str], classes: Sequence[str], where: str) -> set[int]:
    known = {name: position for position, name in enumerate(classes)}
    found: set[int] = set()
    for name in names:
        matching = {known[name]} if name in known else {p for c, p in known.items() if fnmatchcase(c, name)}
        if not matching:
            raise TaskError(f"the split {where}: {unknown('class', name, classes)}")
        found |= matching
    return found
