"""Names of classes and files in a form that can be shown safely."""

import unicodedata
from collections.abc import Sequence

from refilled.words import printable


def visible(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Apply :func:`~refilled.words.printable` to each cell of a table."""
    return [[printable(cell) for cell in row] for row in rows]


def shortened(text: str, width: int = 24) -> str:
    """Cut a text to this many columns of characters; those of East Asian scripts and emoji take two."""
    kept, taken = "", 0
    for character in printable(text):
        taken += columns_of(character)
        if taken > width:
            return f"{kept}…"
        kept += character
    return kept


def columns_of(text: str) -> int:
    """Return the width of a text in columns of characters."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
