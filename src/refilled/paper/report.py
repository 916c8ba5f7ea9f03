"""A table of the paper with our numbers next to the printed ones: on the terminal, as CSV, Markdown and HTML."""

import csv
import io
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader
from matplotlib.figure import Figure
from rich.table import Table as TerminalTable
from rich.text import Text
from scipy.stats import spearmanr

from refilled.compare.summary import count_of, mean_and_spread, paired_gain, spread
from refilled.config import Run
from refilled.fewshot.evaluation import FewShotResult, recorded_accuracies
from refilled.files import write_atomic
from refilled.grid.jobs import load
from refilled.paper.cells import Cell, Choice
from refilled.paper.measures import embed_test_images
from refilled.paper.protocols import FEW_SHOT, PROTOCOLS, RECIPES, SCALES
from refilled.paper.tables import Column, Row, Table
from refilled.report.pictures import Line, address, draw_lines, draw_scatter, svg, tsne
from refilled.runs.inference import task_of
from refilled.runs.result import Result

_FEWEST_ROWS = 3  # for an order to be meaningful
_FIGURE = {
    "seeds": "the last epoch; the test images are used once, at the end",
    "tasks": "the last epoch, or the best on validation tasks in meta-training; the unseen classes are used once",
}
_TRAINED = {"teacher": "teacher", "student, all stages together": "run"}
_IN_ORDER = "rows, best first"
_GAINS = "gain over the student alone, paired by seed, with its 95 % interval"
_RANKS = "order of the rows against the paper's (Spearman)"


@dataclass(frozen=True)
class Entry:
    """A cell and its value.

    Attributes:
        cell: The cell.
        run: Folder of the run that it is about, where there is one.
        value: The value of the cell. None: it was not run.
        interval: Half the width of its 95 % interval over tasks; None where it is about one task.
    """

    cell: Cell
    run: Path | None = None
    value: float | None = None
    interval: float | None = None

    @property
    def result(self) -> Result | FewShotResult | None:
        """What the run found."""
        job = self.cell.run or self.cell.teacher
        if self.run is None or job is None:
            return None
        found = load(job, self.run)
        assert isinstance(found, Result | FewShotResult)  # no cell is about meta-training alone
        return found


@dataclass(frozen=True)
class Shown:
    """A cell as text: ours over its seeds, the paper's number, and the difference."""

    ours: str
    paper: str = ""
    difference: str = ""
    ran: bool = True

    @property
    def beside(self) -> str:
        """The paper's number and the difference."""
        return ", ".join(text for text in (self.paper, self.difference) if text)

    def __str__(self) -> str:
        return f"{self.ours} ({self.beside})" if self.beside else self.ours


@dataclass(frozen=True)
class Order:
    """The rows of a column for which the paper prints a number, best first.

    Attributes:
        column: The column.
        ours: The rows in our order.
        papers: The same rows in the paper's.
        correlation: Spearman's, of the two orders.
    """

    column: str
    ours: Sequence[str]
    papers: Sequence[str]
    correlation: float


@dataclass(frozen=True)
class TableReport:
    """The report of a table.

    Attributes:
        table: The table.
        choice: How it was reproduced.
        entries: One for each cell.
        teachers: The folder of each teacher's run, by its name.
        failures: The reason of each failure, by the cell's name.
        command: The command that resumes or repeats it.
    """

    table: Table
    choice: Choice
    entries: Sequence[Entry]
    teachers: Mapping[str, Path]
    failures: Mapping[str, str]
    command: Sequence[str]

    @property
    def title(self) -> str:
        """Title of the table, with scale and recipe."""
        return f"{self.table.title} ({self.choice.scale}, {self.choice.recipe})"

    def write(self, folder: Path) -> Path:
        """Write ``results.csv``, ``results.md``, a picture where the table has one, and the page; returns the page."""
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {}
        found = self._picture()
        if found is not None:
            caption, figure, numbers = found
            pictures[caption] = svg(figure)
            write_atomic(folder / "picture.svg", pictures[caption])
            write_atomic(folder / "picture.csv", _csv(numbers))
        write_atomic(folder / "results.csv", _csv(self._long()))
        write_atomic(folder / "results.md", self._markdown().encode())
        write_atomic(folder / "report.html", self._page(pictures).encode())
        return folder / "report.html"

    def terminal(self) -> TerminalTable:
        """Lay the table out for a terminal."""
        shown = TerminalTable("", *self._column_names(), title=Text(self.title), show_lines=True)
        for row in self.table.rows:
            cells = [self.shown(row, column) for column in self.table.columns]
            lines = [Text(f"{c.ours}\n{c.beside}" if c.beside else c.ours) if c else Text("") for c in cells]
            shown.add_row(Text(row.name), *lines)
        if any(self.ranks()):
            shown.add_row(Text(_RANKS), *self.ranks())
        return shown

    def sentences(self) -> list[str]:
        """Return the sentences that a reader needs in order to read the table."""
        scale, recipe = SCALES[self.choice.scale], RECIPES[self.choice.recipe]
        said = [
            f"Each cell: ours, {self._mean()}; then the paper's number and the difference. "
            f"{self.table.unit[0].upper()}{self.table.unit[1:]}.",
            f"Scale {self.choice.scale}: {scale.summary}. Recipe {self.choice.recipe}: {recipe.summary}.",
            *(f"Epochs here: {epochs}." for epochs in self._epochs().values()),
            *self._on_teachers(),
        ]
        stand_ins = {column.student: scale.network(column.student) for column in self.table.columns}
        changed = ", ".join(f"{ours} for {papers}" for papers, ours in stand_ins.items() if ours != papers)
        if changed:
            said.append(f"Students instead of the paper's: {changed}.")
        return [*said, self.table.note] if self.table.note else said

    def failed(self) -> list[tuple[str, str]]:
        """Return each reason of failures, with the cells that it concerns."""
        reasons = dict.fromkeys(self.failures.values())
        cells = {reason: [name for name, why in self.failures.items() if why == reason] for reason in reasons}
        return [(r, f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0]) for r, names in cells.items()]

    def shown(self, row: Row, column: Column) -> Shown | None:
        """Return a cell as text, or None if the row has no cell in the column."""
        entries = self._at(row, column)
        if not entries:
            return None
        values = [entry.value for entry in entries if entry.value is not None]
        number = entries[0].cell.paper
        paper = "" if number is None else f"{number:.2f}"
        if not values:
            failed = any(entry.cell.name in self.failures for entry in entries)
            return Shown("failed" if failed else "not run", paper, ran=False)
        partly = "" if len(values) == len(entries) else f", {len(values)} of {len(entries)} seeds"
        difference = "" if number is None else f"{mean(values) - number:+.2f}"
        interval = entries[0].interval
        ours = mean_and_spread(values) if interval is None else f"{values[0]:.2f} ± {interval:.2f}"
        return Shown(ours + partly, paper, difference)

    def ranks(self) -> list[str]:
        """Return the rank correlation with the paper for each column; empty where too few rows have both numbers."""
        found = {order.column: f"{order.correlation:+.2f}" for order in self.orders()}
        return [found.get(column.name, "") for column in self.table.columns]

    def orders(self) -> list[Order]:
        """Sort the rows of each column by our numbers and by the paper's, where enough rows have both."""
        return [order for column in self.table.columns if (order := self._order(column))]

    def gains(self) -> list[list[str]]:
        """Return each row's gain over the student alone, paired by seed: headings, then one line per row.

        Empty if no row and column has both, or if the table averages over tasks.
        """
        alone = next((r for r in self.table.rows if r.method == "vanilla" and r.measure == "accuracy"), None)
        if alone is None or self.table.mean_over != "seeds":
            return []
        rows = [row for row in self.table.rows if row is not alone and row.measure == "accuracy"]
        found = {(row.name, c.name): self._gain(row, alone, c) for row in rows for c in self.table.columns}
        columns = [c.name for c in self.table.columns if any(found[row.name, c.name] for row in rows)]
        lines = [[row.name, *(found[row.name, column] for column in columns)] for row in rows]
        filled = [line for line in lines if any(line[1:])]
        return [["", *columns], *filled] if filled else []

    def _gain(self, row: Row, alone: Row, column: Column) -> str:
        ours, theirs = ({e.cell.seed: e.value for e in self._at(r, column)} for r in (row, alone))
        pairs = [(a, b) for seed, a in ours.items() if a is not None and (b := theirs.get(seed)) is not None]
        return str(paired_gain(*zip(*pairs, strict=True))) if pairs else ""

    def _order(self, column: Column) -> Order | None:
        known = [[entry for entry in self._at(row, column) if entry.value is not None] for row in self.table.rows]
        both = [entries for entries in known if entries and entries[0].cell.paper is not None]
        papers = [number for entries in both if (number := entries[0].cell.paper) is not None]
        ours = _on_common_tasks(both) if self.table.mean_over == "tasks" else [_mean_value(e) for e in both]
        if len(both) < _FEWEST_ROWS or len(set(ours)) == 1 or len(set(papers)) == 1:
            return None
        names = [entries[0].cell.row.name for entries in both]
        return Order(
            column.name, _sorted(names, ours), _sorted(names, papers), float(spearmanr(ours, papers).statistic)
        )

    def _at(self, row: Row, column: Column) -> list[Entry]:
        return [entry for entry in self.entries if entry.cell.row is row and entry.cell.column is column]

    def _column_names(self) -> list[str]:
        return [column.name for column in self.table.columns]

    def _on_teachers(self) -> list[str]:
        printed = "" if self.table.teacher is None else f"; the paper's, {self.table.teacher:.2f} %"
        return [
            f"Teacher {name.partition('-vanilla')[0]}: {result.accuracy:.2f} % of the test images of "
            f"{result.data['task']}{printed}."
            for name, folder in self.teachers.items()
            for result in (Result.load(folder),)
        ]

    def _mean(self) -> str:
        if self.table.mean_over == "seeds" and len(self.choice.seeds) == 1:
            return "one seed"
        if self.table.mean_over == "seeds":
            return f"mean ± standard deviation over {count_of(len(self.choice.seeds), 'seed')}"
        numbers = {found.n_episodes for entry in self.entries if isinstance(found := entry.result, FewShotResult)}
        tasks = " or ".join(map(str, sorted(numbers, reverse=True)))
        return f"mean over {tasks or 'no'} tasks ± its 95 % interval"

    def _provenance(self) -> dict[str, str]:
        results = [found for entry in self.entries if (found := entry.result)]
        summaries = {name: protocol.summary for kind in (PROTOCOLS, FEW_SHOT) for name, protocol in kind.items()}
        protocols = dict.fromkeys(summaries[column.protocol] for column in self.table.columns)
        return {
            "command": shlex.join(self.command),
            "protocol": "; ".join(protocols),
            "recipe": f"{self.choice.recipe}: {RECIPES[self.choice.recipe].summary}",
            **self._epochs(),
            **self._views(),
            "seeds": _words(dict.fromkeys(entry.cell.seed for entry in self.entries)),
            "figure": _FIGURE[self.table.mean_over],
            "data": "; ".join(sorted({_data(result) for result in results})) or "nothing was run",
            "hardware": "; ".join(sorted({_listed(result.hardware) for result in results})),
            "versions": "; ".join(sorted({_listed(result.versions) for result in results})),
        }

    def _epochs(self) -> dict[str, str]:
        """Return the epochs of networks in this reproduction. A recipe's summary has those of the paper."""
        taken = {name: [vars(e.cell)[part] for e in self.entries] for name, part in _TRAINED.items()}
        epochs = {name: sorted({job.epochs for job in jobs if isinstance(job, Run)}) for name, jobs in taken.items()}
        said = [f"{name} {_words(numbers)}" for name, numbers in epochs.items() if numbers]
        return {"epochs here": "; ".join(said)} if said else {}

    def _views(self) -> dict[str, str]:
        runs = [e.cell.run for e in self.entries if isinstance(e.cell.run, Run) and e.cell.run.views is not None]
        views = _words(sorted({run.views for run in runs if run.views is not None}))
        return {"views": f"{views} of each training image, the same in all runs"} if views else {}

    def _long(self) -> list[list[Any]]:
        lines: list[list[Any]] = [
            ["table", "row", "column", "seed", "measure", "value", "paper", "run", "data", "scale", "recipe"]
        ]
        if self.table.mean_over == "tasks":
            lines[0] += ["interval", "tasks", "tasks per second"]
        for entry in self.entries:
            cell = entry.cell
            result = entry.result
            data = "" if result is None else result.data["fingerprint"][:16]
            value = "" if entry.value is None else f"{entry.value:.2f}"
            paper = "" if cell.paper is None else f"{cell.paper:.2f}"
            found = [value, paper, entry.run.name if entry.run else "", data, self.choice.scale, self.choice.recipe]
            lines.append([self.table.name, cell.row.name, cell.column.name, cell.seed, cell.row.measure, *found])
            if isinstance(result, FewShotResult):
                lines[-1] += [f"{entry.interval:.2f}", result.n_episodes, f"{result.tasks_per_second:.3g}"]
        return lines

    def _markdown(self) -> str:
        lines = [["", *self._column_names()], ["---"] * (1 + len(self.table.columns))]
        for row in self.table.rows:
            cells = [self.shown(row, column) for column in self.table.columns]
            lines.append([row.name, *("" if cell is None else str(cell) for cell in cells)])
        failed = "".join(f"* {names}: {reason}\n" for reason, names in self.failed())
        sources = "".join(f"* {name}: {value}\n" for name, value in self._provenance().items())
        parts = [f"# {self.title}\n", "\n\n".join(self.sentences()) + "\n", _markdown_table(lines)]
        if self.orders():
            heads = [_IN_ORDER, "ours", "the paper's", "Spearman"]
            orders = [
                [o.column, "; ".join(o.ours), "; ".join(o.papers), f"{o.correlation:+.2f}"] for o in self.orders()
            ]
            parts.append(_markdown_table([heads, ["---"] * len(heads), *orders]))
        if self.gains():
            heads, *gains = self.gains()
            parts.append(_markdown_table([[_GAINS, *heads[1:]], ["---"] * len(heads), *gains]))
        parts += [f"Failed:\n\n{failed}"] if failed else []
        return "\n".join([*parts, sources])

    def _page(self, pictures: Mapping[str, bytes]) -> str:
        templates = ChoiceLoader(
            [PackageLoader("refilled.paper"), PackageLoader("refilled.report")]
        )  # page.html is there
        page = Environment(loader=templates, autoescape=True).get_template("table.html")
        return page.render(
            title=self.title,
            sentences=self.sentences(),
            columns=self._column_names(),
            lines=[(row.name, [self.shown(row, column) for column in self.table.columns]) for row in self.table.rows],
            in_order=_IN_ORDER,
            orders=self.orders(),
            gained=_GAINS,
            gains=self.gains(),
            failed=self.failed(),
            pictures={caption: address(picture) for caption, picture in pictures.items()},
            provenance=self._provenance(),
        )

    def _picture(self) -> tuple[str, Figure, list[list[Any]]] | None:
        """Draw the table's picture; return its caption, the figure, and the numbers in it."""
        if self.table.picture == "lines" and self._lines():
            lines = self._lines()
            numbers = [[line.name, *point] for line in lines for point in line.points]
            return (
                f"{self.table.unit}, mean and standard deviation over seeds",
                draw_lines(lines, self._column_names(), self.table.columns_are, self.table.unit),
                [["row", self.table.columns_are, "mean", "standard deviation"], *numbers],
            )
        if self.table.picture == "t-SNE":
            embedded = [e for e in self.entries if e.cell.seed == self.choice.seeds[0] and e.value is not None]
            if len(embedded) == len(self.table.rows):
                return _scatter(embedded)
        return None

    def _lines(self) -> list[Line]:
        lines = []
        for row in self.table.rows:
            points = []
            for column in self.table.columns:
                values = [entry.value for entry in self._at(row, column) if entry.value is not None]
                if values:
                    points.append((column.name, mean(values), spread(values)))
            if points:
                lines.append(Line(row.name, points))
        return lines


def _sorted(names: Sequence[str], values: Sequence[float]) -> list[str]:
    """Sort names by their values, the highest first."""
    return [name for _, name in sorted(zip(values, names, strict=True), reverse=True)]


def _mean_value(entries: Sequence[Entry]) -> float:
    return mean(entry.value for entry in entries if entry.value is not None)


def _on_common_tasks(rows: Sequence[Sequence[Entry]]) -> list[float]:
    """Return means over the first tasks, which all rows share, so that no row benefits from easier tasks."""
    accuracies = [recorded_accuracies(entry.run) for (entry,) in rows if entry.run is not None]
    common = min(map(len, accuracies), default=0)
    return [mean(found[:common]) for found in accuracies]


def _scatter(entries: Sequence[Entry]) -> tuple[str, Figure, list[list[Any]]]:
    embeddings = {}
    for entry in entries:
        assert entry.run is not None  # it has a value
        embeddings[entry.cell.row.name], labels = embed_test_images(entry.cell, entry.run)
        classes = task_of(entry.run).classes
    scatter = tsne(embeddings, labels)
    numbers = [
        [name, *point, classes[label]]
        for name, points in scatter.points.items()
        for point, label in zip(points.tolist(), scatter.labels, strict=True)
    ]
    caption = "Test images of ten classes, coloured by class (t-SNE, first seed)"
    return caption, draw_scatter(scatter, classes), [["embedding", "x", "y", "class"], *numbers]


def _markdown_table(lines: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _csv(lines: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    return text.getvalue().encode()


def _data(result: Result | FewShotResult) -> str:
    found, print_ = result.data, result.data["fingerprint"][:16]
    if isinstance(result, FewShotResult):
        return f"{found['pool']}, {found['images']} images of {found['classes']} classes, {print_}"
    return f"{found['task']}, {_listed(found['images'])} images, {print_}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _words(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
