"""What a source of images offers before anything is decoded: classes, labels, and a way to the pictures."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from refilled.data.transforms import Augmentation

PART_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What folders and files of the parts are called."""

Rows = NDArray[np.int64]
Picture = bytes | Path | NDArray[Any]
"""An encoded image, the file that holds one, or uint8 pixels ``(H, W)`` or ``(H, W, 3)``."""


class Part(Protocol):
    """The train, val or test part of a source: N images, known so far by their labels."""

    @property
    def labels(self) -> Rows:
        """Positions ``(N,)`` in the source's classes."""

    def name(self, row: int) -> str:
        """Say where an image came from, for reports."""

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Give the pictures of these rows, which ascend, one after the other."""


@dataclass(frozen=True)
class Source:
    """A data set, opened but not decoded."""

    classes: tuple[str, ...]
    train: Part
    val: Part | None = None
    test: Part | None = None
    augmentation: Augmentation = "crop-flip"
    image_size: int | None = None  # the side length, where the source knows it
    licence: str | None = None
    citation: str | None = None


@dataclass(frozen=True)
class ArrayPart:
    """A part whose pixels are in memory already, uint8 ``(N, H, W)`` or ``(N, H, W, 3)``."""

    labels: Rows
    pixels: NDArray[np.uint8]
    prefix: str

    def name(self, row: int) -> str:
        """Say where an image came from: ``digits#17``."""
        return f"{self.prefix}#{row}"

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Give the pixels of these rows."""
        return (self.pixels[row] for row in rows)
