"""Find the image file below a folder that a name in a list stands for."""

import os
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

from refilled.data.decode import SUFFIXES
from refilled.data.source import part_called
from refilled.data.walking import fold_name, is_hidden
from refilled.errors import TaskError

T = TypeVar("T")


class ListedImages:
    """The files below a folder, found by the names that lists give them.

    Args:
        root: The folder. Files outside it are never found.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def files(self) -> list[PurePosixPath]:
        """Paths relative to the root, in order, without hidden files. Only links directly below the root are followed.

        Raises:
            TaskError: The root cannot be listed.
        """
        paths = []
        try:
            tops = sorted(self.root.iterdir())
        except OSError as error:
            raise TaskError(f"the folder {self.root} cannot be listed: {error.strerror}") from error
        for top in tops:
            if is_hidden(top.name):
                continue
            if not top.is_dir():
                paths.append(PurePosixPath(top.name))
                continue
            for place, folders, files in os.walk(top):
                inner = PurePosixPath(Path(place).relative_to(self.root).as_posix())
                paths += [inner / name for name in files if not is_hidden(name)]
                folders[:] = [name for name in folders if not is_hidden(name)]
        return sorted(paths)

    @cached_property
    def pictures(self) -> list[PurePosixPath]:
        """The files with the suffix of an image format."""
        return [file for file in self.files if file.suffix.lower() in SUFFIXES]

    def in_folders(self) -> bool:
        """Return whether the pictures lie in several folders that are not named after parts."""
        return len({file.parent for file in self.pictures if part_called(file.parent.name) is None}) > 1

    def find(self, name: str, preferred: str) -> PurePosixPath | None:
        """Return the file that a list calls ``name``, relative to the root; None if there is none.

        The name may lack the folders above it and the suffix. If several files match, the one directly below the root,
        below the folder ``preferred`` or below the folder ``images`` is returned.

        Raises:
            TaskError: The name is ambiguous.
        """
        parts = [fold_name(part) for part in name.split("/") if part not in ("", ".")]
        if not parts or ".." in parts:
            return None
        candidates = self._by_name.get(parts[-1]) or self._by_stem.get(parts[-1]) or []
        matches = [file for file in candidates if list(map(fold_name, file.parts[-len(parts) : -1])) == parts[:-1]]
        for place in ((), (fold_name(preferred),), ("images",)):
            nearest = [file for file in matches if tuple(map(fold_name, file.parts[: -len(parts)])) == place]
            if len(nearest) == 1:
                return nearest[0]
        exact = [file for file in matches if str(file).endswith(name)]
        matches = exact if len(exact) == 1 else matches
        if len(matches) > 1:
            raise TaskError(
                f"'{name}' may be {matches[0]} or {matches[1]} below {self.root}; write the folder and the suffix in "
                "the list"
            )
        return matches[0] if matches else None

    @cached_property
    def _by_name(self) -> dict[str, list[PurePosixPath]]:
        return group_by((fold_name(file.name), file) for file in self.files)

    @cached_property
    def _by_stem(self) -> dict[str, list[PurePosixPath]]:
        return group_by((fold_name(file.stem), file) for file in self.pictures)


def group_by(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """Return the values of (key, value) pairs grouped by key."""
    groups: dict[str, list[T]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return dict(groups)
