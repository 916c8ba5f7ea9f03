"""Reproduce a table or figure of the paper, and compare the results with the printed numbers."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from refilled.config import Run
from refilled.cost.grid import estimate
from refilled.errors import RefilledError, RunError, unknown
from refilled.fewshot.evaluation import FewShotResult
from refilled.grid.executors import Executor, processes
from refilled.grid.jobs import Job, JobResult, accuracy
from refilled.grid.runner import run_grid
from refilled.paper.cells import Cell, Choice, JobGraph, cells, chosen
from refilled.paper.measures import measure
from refilled.paper.rendering import terminal, write
from refilled.paper.report import Entry, TableReport
from refilled.paper.schema import Table
from refilled.paper.tables import TABLES
from refilled.report.many import FEW_IMAGES, Leave, no_report, write_missing
from refilled.report.page import Surroundings
from refilled.words import count_of


@dataclass(frozen=True)
class Outcome:
    """The outcome of reproducing a table.

    Attributes:
        page: The file of the page.
        failures: The reason of each failure, by the name of the cell.
    """

    page: Path
    failures: Mapping[str, str]


def find_table(name: str) -> Table:
    """Find a table or figure of the paper.

    Raises:
        RunError: The name is unknown.
    """
    if name not in TABLES:
        raise RunError(unknown("table", name, TABLES))
    return TABLES[name]


def fill(
    table: Table,
    choice: Choice,
    folder: Path,
    jobs: int = 1,
    console: Console | None = None,
    executor: Executor = processes,
    reports: bool = True,
) -> Outcome:
    """Run the missing cells of a table, and report all cells next to the paper's numbers.

    The runs are in ``folder/runs`` and are shared by all tables. The report of a table is in
    ``folder/<table>-<scale>-<recipe>``. Several processes may fill the same table, or different ones, at once. A failed
    cell does not affect the others.

    Args:
        table: The table or figure.
        choice: Scale, recipe, seeds and cells.
        folder: Folder of the runs of all tables.
        jobs: Number of concurrent runs.
        console: Where progress and results are printed.
        executor: Opens the pool of workers.
        reports: Whether each training run gets a report, compared with the student alone if the table has it.

    Raises:
        RefilledError: A problem that affects more than single cells, such as missing data. Nothing has been run then.
    """
    console = console or Console()
    every = cells(table, choice)
    graph = JobGraph(every, folder / "runs")
    wanted = chosen(table, every, choice.only)
    missing = graph.missing(wanted)
    seeds = count_of(len({cell.seed for cell in every}), "seed")
    _say(console, f"{table.title}: scale {choice.scale}, recipe {choice.recipe}, {seeds}")
    for line in estimate(graph, missing, jobs):
        _say(console, line)
    failures = {cell.name: str(problem) for cell, problem in graph.problems.items() if cell in wanted}
    failed = _carry_out(graph, missing, jobs, console, executor, reports)
    failures |= {cell.name: failed[name] for cell in wanted if (name := graph.run_of(cell)) in failed}
    entries = [_entry(cell, graph, folder / "measures", failures) for cell in every]
    teachers = dict.fromkeys(name for cell in every if (name := graph.teacher_of(cell)) and graph.result(name))
    report = TableReport(
        table,
        choice,
        entries,
        {name: graph.folder / name for name in teachers},
        failures,
        _command(table, choice, folder),
    )
    page = write(report, folder / f"{table.name}-{choice.scale}-{choice.recipe}")
    console.print(terminal(report))
    for text in (*report.sentences(), *(f"failed: {names}: {reason}" for reason, names in report.failed())):
        _say(console, text)
    return Outcome(page, failures)


def estimate_table(table: Table, choice: Choice, folder: Path, jobs: int = 1) -> list[str]:
    """Return lines about what is missing of a table: its estimated time, and the cells that cannot be run."""
    every = cells(table, choice)
    graph = JobGraph(every, folder / "runs")
    wanted = chosen(table, every, choice.only)
    failed = [f"failed: {cell.name}: {problem}" for cell, problem in graph.problems.items() if cell in wanted]
    missing = graph.missing(wanted)
    return failed if failed and not missing else [*failed, *estimate(graph, missing, jobs)]


def _carry_out(
    graph: JobGraph, missing: Mapping[str, Job], jobs: int, console: Console, executor: Executor, reports: bool
) -> dict[str, str]:
    """Execute the missing jobs; return the reasons of failures, by the names of the jobs."""
    failures: dict[str, str] = {}
    count = itertools.count(1)

    def tell(name: str, result: JobResult) -> None:
        _say(console, f"  {next(count)}/{len(missing)} {name}: {accuracy(result):.2f} %")

    def note(name: str, error: Exception) -> None:
        # For unexpected errors, the type is more informative than the message.
        failures[name] = str(error) if isinstance(error, RefilledError) else f"{type(error).__name__}: {error}"
        _say(console, f"  {next(count)}/{len(missing)} {name} failed: {failures[name]}")

    needs = {name: [other for other in graph.needs.get(name, ()) if other in missing] for name in missing}
    around = _surroundings(graph, missing, jobs) if reports else {}
    after = {name: Leave(each) for name, each in around.items()}
    run_grid(missing, graph.folder, jobs, tell, note, needs, executor, after)
    unwritten = write_missing({graph.folder / name: each for name, each in around.items()}, jobs, executor)
    for place, reason in unwritten.items():
        _say(console, no_report(place, reason))
    return failures


def _surroundings(graph: JobGraph, missing: Mapping[str, Job], jobs: int) -> dict[str, Surroundings]:
    """Return what the report of each training run says about the student alone, by the name of its job."""
    found = {}
    for name, job in missing.items():
        if isinstance(job, Run):
            alone = graph.alone(job)
            done = alone in missing or graph.result(alone) is not None
            against = graph.folder / alone if alone not in (None, name) and done else None
            found[name] = Surroundings(against, images=FEW_IMAGES, timed=jobs == 1)
    return found


def _entry(cell: Cell, graph: JobGraph, kept: Path, failures: dict[str, str]) -> Entry:
    name = graph.run_of(cell)
    result = graph.result(name)
    if name is None or result is None:
        return Entry(cell)
    interval = result.interval if isinstance(result, FewShotResult) else None
    try:
        return Entry(cell, graph.folder / name, measure(cell, graph.folder / name, kept), interval)
    except RefilledError as error:
        failures[cell.name] = str(error)
        return Entry(cell)


def _command(table: Table, choice: Choice, folder: Path) -> list[str]:
    options = {"--scale": choice.scale, "--recipe": choice.recipe, "--seeds": len(choice.seeds), "--out": folder}
    return ["refilled", "reproduce", table.name, *(str(part) for option in options.items() for part in option)]


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
