"""The content of a table's report: our numbers next to the paper's, orders, gains, and provenance.

:mod:`refilled.paper.rendering` writes it as text, CSV, Markdown, HTML and pictures.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import spearmanr

from refilled.compare.summary import mean_and_spread, paired_gain
from refilled.config import Run
from refilled.fewshot.evaluation import FewShotResult, recorded_accuracies
from refilled.grid.jobs import load
from refilled.paper.cells import Cell, Choice
from refilled.paper.protocols import FEW_SHOT, PROTOCOLS, RECIPES, SCALES
from refilled.paper.schema import Column, Row, Table
from refilled.runs.result import Result
from refilled.words import count_of

_FEWEST_ROWS = 3  # for an order to be meaningful
_FIGURE = {
    "seeds": "the last epoch; the test images are used once, at the end",
    "tasks": "the last epoch, or the best on validation tasks in meta-training; the unseen classes are used once",
}
_TRAINED = {"teacher": "teacher", "student, all stages together": "run"}


@dataclass(frozen=True)
class Entry:
    """A cell and its value.

    Attributes:
        cell: The cell.
        run: Folder of the run that the value comes from. None: the cell was not run.
        value: The value of the cell. None: it has none.
        interval: Half the width of the 95 % interval over tasks. None: the value is not a mean over several tasks.
    """

    cell: Cell
    run: Path | None = None
    value: float | None = None
    interval: float | None = None

    @property
    def result(self) -> Result | FewShotResult | None:
        """The result of the run; None if the cell was not run."""
        job = self.cell.run or self.cell.teacher
        if self.run is None or job is None:
            return None
        result = load(job, self.run)
        assert isinstance(result, Result | FewShotResult)  # no cell is about meta-training alone
        return result


@dataclass(frozen=True)
class Shown:
    """A cell as text: our number over its seeds, the paper's number, and the difference."""

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
        papers: The same rows in the paper's order.
        correlation: Spearman's rank correlation of the two orders, -1 to 1.
    """

    column: str
    ours: Sequence[str]
    papers: Sequence[str]
    correlation: float


@dataclass(frozen=True)
class TableReport:
    """The content of a table's report.

    Attributes:
        table: The table.
        choice: The scale, recipe and seeds of the reproduction.
        entries: One per cell.
        teachers: The folder of each teacher's run, by the name of the run.
        failures: The reason of each failure, by the name of the cell.
        command: The command that resumes or repeats the reproduction.
    """

    table: Table
    choice: Choice
    entries: Sequence[Entry]
    teachers: Mapping[str, Path]
    failures: Mapping[str, str]
    command: Sequence[str]

    @property
    def title(self) -> str:
        """The title of the table, with scale and recipe."""
        return f"{self.table.title} ({self.choice.scale}, {self.choice.recipe})"

    def sentences(self) -> list[str]:
        """Return the sentences that a reader needs in order to read the table."""
        scale, recipe = SCALES[self.choice.scale], RECIPES[self.choice.recipe]
        sentences = [
            f"Each cell: ours, {self._mean()}; then the paper's number and the difference. "
            f"{self.table.unit[0].upper()}{self.table.unit[1:]}.",
            f"Scale {self.choice.scale}: {scale.summary}. Recipe {self.choice.recipe}: {recipe.summary}.",
            *(f"Epochs here: {epochs}." for epochs in self._epochs().values()),
            *self._on_teachers(),
        ]
        stand_ins = {column.student: scale.network(column.student) for column in self.table.columns}
        changed = ", ".join(f"{ours} for {papers}" for papers, ours in stand_ins.items() if ours != papers)
        if changed:
            sentences.append(f"Students instead of the paper's: {changed}.")
        return [*sentences, self.table.note] if self.table.note else sentences

    def failed(self) -> list[tuple[str, str]]:
        """Return each reason of failures, with the names of the failed cells."""
        reasons = dict.fromkeys(self.failures.values())
        cells = {reason: [name for name, why in self.failures.items() if why == reason] for reason in reasons}
        return [(r, f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0]) for r, names in cells.items()]

    def shown(self, row: Row, column: Column) -> Shown | None:
        """Return a cell as text, or None if the row has no cell in the column."""
        entries = self.at(row, column)
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
        correlations = {order.column: f"{order.correlation:+.2f}" for order in self.orders()}
        return [correlations.get(column.name, "") for column in self.table.columns]

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
        gains = {(row.name, c.name): self._gain(row, alone, c) for row in rows for c in self.table.columns}
        columns = [c.name for c in self.table.columns if any(gains[row.name, c.name] for row in rows)]
        lines = [[row.name, *(gains[row.name, column] for column in columns)] for row in rows]
        filled = [line for line in lines if any(line[1:])]
        return [["", *columns], *filled] if filled else []

    def _gain(self, row: Row, alone: Row, column: Column) -> str:
        ours, theirs = ({e.cell.seed: e.value for e in self.at(r, column)} for r in (row, alone))
        pairs = [(a, b) for seed, a in ours.items() if a is not None and (b := theirs.get(seed)) is not None]
        return str(paired_gain(*zip(*pairs, strict=True))) if pairs else ""

    def _order(self, column: Column) -> Order | None:
        known = [[entry for entry in self.at(row, column) if entry.value is not None] for row in self.table.rows]
        both = [entries for entries in known if entries and entries[0].cell.paper is not None]
        papers = [number for entries in both if (number := entries[0].cell.paper) is not None]
        ours = _on_common_tasks(both) if self.table.mean_over == "tasks" else [_mean_value(e) for e in both]
        if len(both) < _FEWEST_ROWS or len(set(ours)) == 1 or len(set(papers)) == 1:
            return None
        names = [entries[0].cell.row.name for entries in both]
        return Order(
            column.name, _sorted(names, ours), _sorted(names, papers), float(spearmanr(ours, papers).statistic)
        )

    def at(self, row: Row, column: Column) -> list[Entry]:
        """Return the entries of a row and a column, one per seed."""
        return [entry for entry in self.entries if entry.cell.row is row and entry.cell.column is column]

    def column_names(self) -> list[str]:
        """Return the names of the columns."""
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
        results = [entry.result for entry in self.entries]
        numbers = {result.n_episodes for result in results if isinstance(result, FewShotResult)}
        tasks = " or ".join(map(str, sorted(numbers, reverse=True)))
        return f"mean over {tasks or 'no'} {'task' if numbers == {1} else 'tasks'} ± its 95 % interval"

    def provenance(self) -> dict[str, str]:
        """Return what the numbers depend on, as text by heading: command, protocol, data, hardware, versions, ..."""
        results = [result for entry in self.entries if (result := entry.result)]
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
        """Return the epochs in this reproduction. The summary of a recipe gives those of the paper."""
        taken = {name: [vars(e.cell)[part] for e in self.entries] for name, part in _TRAINED.items()}
        epochs = {name: sorted({job.epochs for job in jobs if isinstance(job, Run)}) for name, jobs in taken.items()}
        parts = [f"{name} {_words(numbers)}" for name, numbers in epochs.items() if numbers]
        return {"epochs here": "; ".join(parts)} if parts else {}

    def _views(self) -> dict[str, str]:
        runs = [e.cell.run for e in self.entries if isinstance(e.cell.run, Run) and e.cell.run.views is not None]
        views = _words(sorted({run.views for run in runs if run.views is not None}))
        return {"views": f"{views} of each training image, the same in all runs"} if views else {}


def _sorted(names: Sequence[str], values: Sequence[float]) -> list[str]:
    """Return the names in the order of their values, highest first."""
    return [name for _, name in sorted(zip(values, names, strict=True), reverse=True)]


def _mean_value(entries: Sequence[Entry]) -> float:
    return mean(entry.value for entry in entries if entry.value is not None)


def _on_common_tasks(rows: Sequence[Sequence[Entry]]) -> list[float]:
    """Return means over the first tasks, which all rows share, so that no row benefits from easier tasks."""
    accuracies = [recorded_accuracies(entry.run) for (entry,) in rows if entry.run is not None]
    common = min(map(len, accuracies), default=0)
    return [mean(own[:common]) for own in accuracies]


def _data(result: Result | FewShotResult) -> str:
    data, fingerprint = result.data, result.data["fingerprint"][:16]
    if isinstance(result, FewShotResult):
        return f"{data['pool']}, {data['images']} images of {data['classes']} classes, {fingerprint}"
    return f"{data['task']}, {_listed(data['images'])} images, {fingerprint}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _words(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
