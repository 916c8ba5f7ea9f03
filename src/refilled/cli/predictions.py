"""The rows that ``predict`` prints, batch by batch as they are computed: CSV, JSON lines, or a table."""

import csv
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.segment import Segment, Segments
from rich.table import Table

from refilled.cli.show import console, err
from refilled.files import spreadsheet_cell
from refilled.words import printable

if TYPE_CHECKING:
    from refilled.runs.classifying import Predicted


class CsvRows:
    """One row per image, with all probabilities."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = list(map(spreadsheet_cell, classes))
        self._writer = csv.writer(sys.stdout)
        self._begun = False

    def add(self, batch: "Predicted") -> None:
        """Print the rows of a batch, and the skipped files."""
        if not self._begun:  # only now, so that a command that fails prints no header
            self._writer.writerow(["image", "class", *self._classes])
            self._begun = True
        numbers = batch.probabilities.numpy()
        for image, best, row in zip(batch.images, numbers.argmax(1), numbers.tolist(), strict=True):
            cells = [spreadsheet_cell(str(image)), self._classes[best]]
            self._writer.writerow([*cells, *map("{:.6f}".format, row)])
        sys.stdout.flush()
        _print_unreadable(batch)

    def close(self) -> None:
        """Do nothing; all rows are printed already."""


class JsonRows:
    """One JSON object per image, with all probabilities."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = classes

    def add(self, batch: "Predicted") -> None:
        """Print the rows of a batch, and the skipped files."""
        numbers = batch.probabilities.numpy()
        for image, best, row in zip(batch.images, numbers.argmax(1), numbers.tolist(), strict=True):
            probabilities = dict(zip(self._classes, row, strict=True))
            print(json.dumps({"image": str(image), "class": self._classes[best], "probabilities": probabilities}))
        sys.stdout.flush()
        _print_unreadable(batch)

    def close(self) -> None:
        """Do nothing; all rows are printed already."""


class TableRows:
    """A table of the most probable classes.

    The columns fit the first batch and all class names, and keep their widths for later batches. The table ends before
    each list of skipped files, and a new table starts after it.
    """

    def __init__(self, classes: Sequence[str], top: int, to: Console = console) -> None:
        self._classes = [printable(name) for name in classes]
        self._top = top
        self._console = to
        self._widths: tuple[int, ...] = ()
        self._open = False

    def add(self, batch: "Predicted") -> None:
        """Print the rows of a batch, and the skipped files."""
        if batch.images:
            self._print(self._rows(batch))
        if batch.unreadable:
            self.close()
            _print_unreadable(batch)

    def close(self) -> None:
        """Draw the bottom border."""
        if self._open:
            self._print_lines(self._table(), slice(-1, None))
            self._open = False

    def _rows(self, batch: "Predicted") -> list[tuple[str, str, str]]:
        rows = []
        ordered = batch.probabilities.sort(stable=True, dim=1, descending=True)
        for image, numbers, places in zip(
            batch.images, ordered.values[:, : self._top].tolist(), ordered.indices[:, : self._top].tolist(), strict=True
        ):
            names = [printable(str(image))] + [""] * (len(numbers) - 1)
            shares = (f"{100 * number:.1f} %" for number in numbers)
            rows += list(zip(names, (self._classes[place] for place in places), shares, strict=True))
        return rows

    def _print(self, rows: list[tuple[str, str, str]]) -> None:
        if not self._widths:
            widest_class = max(map(cell_len, self._classes))
            self._widths = (max(cell_len(row[0]) for row in rows), widest_class, len("100.0 %"))
        table = self._table()
        for row in rows:
            table.add_row(*map(escape, row))
        # Without the bottom border, and in an open table also without the heading: border, names, border.
        self._print_lines(table, slice(3 if self._open else 0, -1))
        self._open = True

    def _table(self) -> Table:
        table = Table()
        for name, width in zip(("image", "class", "probability"), self._widths, strict=True):
            table.add_column(name, min_width=max(width, len(name)), max_width=max(width, len(name)))
        return table

    def _print_lines(self, table: Table, which: slice) -> None:
        lines = self._console.render_lines(table, pad=False)[which]
        with_ends = [segment for line in lines for segment in (*line, Segment.line())]
        self._console.print(Segments(with_ends), end="")
        self._console.file.flush()


def _print_unreadable(batch: "Predicted") -> None:
    for image, reason in batch.unreadable:
        line = f"skipped {printable(str(image))}: {printable(reason)}"
        err.print(line, markup=False, highlight=False, soft_wrap=True)
