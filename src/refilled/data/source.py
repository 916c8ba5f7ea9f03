"""Sources of images before decoding: classes, labels, and access to the encoded pictures."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from refilled.data.several import NONE, Several
from refilled.data.transforms import Augmentation
from refilled.errors import TaskError

PART_NAMES = {
    word: part
    for part, words in {
        "train": "train training trainset trainingset traindata trainingdata trainimages",
        "val": "val valid validation valset validset validationset valdata validationdata dev devset eval evaluation",
        "test": "test testing testset testingset testdata testingdata testimages holdout",
    }.items()
    for word in words.split()
}
"""The part that each usual name of a folder or file stands for. Names are in lower case, without separators."""


def part_called(name: str) -> str | None:
    """Return the part that a folder of this name holds: ``train``, ``val`` or ``test``. None: it is not a part."""
    return PART_NAMES.get(re.sub(r"[^a-z0-9]+", "", name.lower()))


Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Crop:
    """The content of a box in a picture file. It is resized to a square regardless of its aspect ratio."""

    path: Path
    box: tuple[float, float, float, float]
    """Left, top, right and bottom, in pixels; clipped at the borders of the picture."""


Picture = bytes | Path | Crop | NDArray[Any]
"""An encoded image, a file that holds one, a box in such a file, or uint8 pixels ``(H, W)`` or ``(H, W, 3)``."""


class Part(Protocol):
    """The train, val or test part of a source: N images with labels, not decoded."""

    @property
    def labels(self) -> Rows:
        """Positions ``(N,)`` in the source's classes."""

    def name(self, row: int) -> str:
        """Return the name of an image, for reports: where it comes from."""

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Yield the pictures of these rows, which must be ascending."""

    def stamp(self) -> str:
        """Return a digest that changes when a file of the pictures is changed or added."""


def part_in_name(name: str) -> tuple[str | None, str]:
    """Return the part in the name of a file or folder, and the word that names it; (None, "") if no word does.

    The first word of the name decides, as in ``train-00000-of-00002.parquet``. If it does not name a part, the other
    words decide, provided that they name a single part, as in ``birds_test.csv``.
    """
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    named = [word for word in words if word in PART_NAMES]
    if named and (named[0] == words[0] or len({PART_NAMES[word] for word in named}) == 1):
        return PART_NAMES[named[0]], named[0]
    return None, ""


def by_part(named: Iterable[tuple[Path, str]], where: Path) -> dict[str, list[Path]]:
    """Group files by the part in a name. Return an empty dictionary if no name contains a part.

    Args:
        named: Each file, and the name that should contain its part.
        where: The folder, for errors.

    Raises:
        TaskError: Only some of the names contain a part, or two words are used for one part.
    """
    files = [(file, *part_in_name(name)) for file, name in named]
    if all(part is None for _, part, _ in files):
        return {}
    parts: dict[str, list[Path]] = {}
    words: dict[str, str] = {}
    for file, part, word in files:
        if part is None:
            raise TaskError(
                f"{file} belongs to no part of {where}: its name should begin with train, validation or test. Rename "
                "it, or move it elsewhere"
            )
        if words.setdefault(part, word) != word:
            raise TaskError(
                f"{where} has two kinds of files for the {part} part, '{words[part]}' and '{word}' ({parts[part][0]} "
                f"and {file}); keep one, or rename the other"
            )
        parts.setdefault(part, []).append(file)
    return {part: parts[part] for part in ("train", "val", "test") if part in parts}


@dataclass(frozen=True)
class Names(Sequence[str]):
    """Names of images, built on demand: the strings of millions of images would not fit in memory."""

    part: Part
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        """Return the name of one image, or of several."""
        if isinstance(index, slice):
            return tuple(map(self.part.name, self.rows[index].tolist()))
        return self.part.name(int(self.rows[index]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]


def stamp_of(files: Iterable[Path], *more: str) -> str:
    """Return a digest of the names, sizes and times of change of files, and of further texts."""
    digest = sha256(json.dumps(more).encode())
    for file in files:
        try:
            status = file.stat()
            state = [status.st_size, status.st_ctime_ns]  # not the time of modification: a chmod leaves it unchanged
        except OSError:
            state = []
        digest.update(json.dumps([str(file), *state]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """A data set that is opened but not decoded."""

    classes: tuple[str, ...]
    train: Part
    val: Part | None = None
    test: Part | None = None
    augmentation: Augmentation = "crop-flip"
    image_size: int | None = None  # side length in pixels, if the source sets it
    fixed: bool = False  # whether the publisher has fixed the rows, so that cuts may depend on them
    licence: str | None = None
    citation: str | None = None
    notes: tuple[str, ...] = ()
    """Facts about how the source was read, for the reader of results."""
    ignored: Several = NONE
    """Files of a folder that are not used."""


def merge_parts(source: Source) -> Source:
    """Return the source with all parts merged into the training part."""
    parts = tuple(part for part in (source.train, source.val, source.test) if part is not None)
    return replace(source, train=MergedPart(parts), val=None, test=None)


@dataclass(frozen=True)
class MergedPart:
    """Several parts as one. The rows of each part follow those of the part before."""

    parts: tuple[Part, ...]

    @property
    def labels(self) -> Rows:
        """Positions ``(N,)`` in the source's classes."""
        return np.concatenate([part.labels for part in self.parts])

    def name(self, row: int) -> str:
        """Return the name of an image in its own part."""
        part = int(np.searchsorted(self._ends(), row, side="right"))
        return self.parts[part].name(row - self._starts()[part])

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Yield the pictures of these rows, which must be ascending."""
        for part, start, end in zip(self.parts, self._starts(), self._ends(), strict=True):
            yield from part.pictures(rows[(start <= rows) & (rows < end)] - start)

    def stamp(self) -> str:
        """Return a digest of the stamps of the parts."""
        return stamp_of((), *(part.stamp() for part in self.parts))

    def _ends(self) -> list[int]:
        return list(accumulate(len(part.labels) for part in self.parts))

    def _starts(self) -> list[int]:
        return [0, *self._ends()[:-1]]


@dataclass(frozen=True)
class SelectedPart:
    """Some of the rows of another part."""

    whole: Part
    rows: Rows
    """Rows of the other part, ascending."""

    @property
    def labels(self) -> Rows:
        """Positions ``(N,)`` in the source's classes."""
        return self.whole.labels[self.rows]

    def name(self, row: int) -> str:
        """Return the name of an image in the other part."""
        return self.whole.name(int(self.rows[row]))

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Yield the pictures of these rows, which must be ascending."""
        return self.whole.pictures(self.rows[rows])

    def stamp(self) -> str:
        """Return a digest of the stamp of the other part and of the rows."""
        return stamp_of((), self.whole.stamp(), sha256(self.rows.tobytes()).hexdigest())


@dataclass(frozen=True)
class ArrayPart:
    """A part whose pixels are in memory, uint8 ``(N, H, W)`` or ``(N, H, W, 3)``."""

    labels: Rows
    pixels: NDArray[np.uint8]
    prefix: str

    def name(self, row: int) -> str:
        """Return the name of an image, such as ``digits#17``."""
        return f"{self.prefix}#{row}"

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Return the pixels of these rows."""
        return (self.pixels[row] for row in rows)

    def stamp(self) -> str:
        """Return a digest of the pixels."""
        return sha256(self.pixels.tobytes()).hexdigest()
