"""The confusion matrix as a drawing with the names of the classes on its axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from refilled.report.text import columns_of, shortened
from refilled.words import printable

MOST = 200
"""Classes whose names fit on the axes."""

_LETTER = 6.6  # pixels, at the size of the page's style
_COUNTED = 12  # classes, up to which the cells hold their numbers
_SIDES = ((12, 30), (40, 18), (MOST, 13))  # pixels of a cell, up to a number of classes


@dataclass(frozen=True)
class Cell:
    """A pair of classes with images."""

    column: int
    row: int
    count: int
    opacity: float
    """The square root of the share of the true class's images, so that single errors are visible."""
    title: str


@dataclass(frozen=True)
class Matrix:
    """The layout of the drawing in pixels, for the template.

    Attributes:
        names: Shortened names.
        titles: Full names.
        cells: The pairs of classes with images.
        side: Side length of a cell.
        margin: Width of the names, at the left and on top.
        size: Side length of the drawing.
        counted: Whether the cells hold their numbers.
    """

    names: list[str]
    titles: list[str]
    cells: list[Cell]
    side: int
    margin: int
    size: int
    counted: bool


def matrix_of(confusion: Tensor, classes: Sequence[str]) -> Matrix | None:
    """Lay out a confusion matrix ``(C, C)``, true classes in rows; None if there are more than :data:`MOST` classes."""
    count = len(classes)
    if count > MOST:
        return None
    side = next(pixels for most, pixels in _SIDES if count <= most)
    names, titles = [shortened(name) for name in classes], [printable(name) for name in classes]
    margin = round(_LETTER * max(map(columns_of, names))) + 12
    totals = confusion.sum(1).tolist()
    cells = []
    for row, column in confusion.nonzero().tolist():
        images = int(confusion[row, column])
        text = f"true {titles[row]}, predicted {titles[column]}: {images} of {totals[row]}"
        cells.append(Cell(column, row, images, round(max(0.15, sqrt(images / totals[row])), 2), text))
    return Matrix(names, titles, cells, side, margin, margin + side * count + 1, count <= _COUNTED)
