"""Reproduce a table or figure of the paper, and compare the results with the printed numbers."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from refilled.compare.summary import count_of
from refilled.cost.grid import estimate
from refilled.errors import RefilledError, RunError, unknown
from refilled.fewshot.evaluation import FewShotResult
from refilled.grid.executors import Executor, processes
from refilled.grid.jobs import Found, Job, accuracy
from refilled.grid.runner import run_grid
from refilled.paper.cells import Cell, Choice, Plan, cells, chosen
from refilled.paper.measures import measure
from refilled.paper.report import Entry, TableReport
from refilled.paper.tables import TABLES, Table


@dataclass(frozen=True)
class Outcome:
    """The outcome of reproducing a table.

    Attributes:
        page: The page that shows it.
        failures: The reason of each failure, by the cell's name.
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
) -> Outcome:
    """Run what is missing of a table, and report it next to the paper's numbers.

    Runs lie in ``folder/runs`` and are shared by all tables. The report of a table lies in
    ``folder/<table>-<scale>-<recipe>``. Several processes may fill the same table or others at once. A failed cell does
    not affect the others.

    Raises:
        RefilledError: A problem of more than single cells, such as missing data. Nothing has been run then.
    """
    console = console or Console()
    every = cells(table, choice)
    plan = Plan(every, folder / "runs")
    wanted = chosen(table, every, choice.only)
    missing = plan.missing(wanted)
    seeds = count_of(len({cell.seed for cell in every}), "seed")
    _say(console, f"{table.title}: scale {choice.scale}, recipe {choice.recipe}, {seeds}")
    for line in estimate(plan, missing, jobs):
        _say(console, line)
    failures = {cell.name: str(problem) for cell, problem in plan.problems.items() if cell in wanted}
    failed = _carry_out(plan, missing, jobs, console, executor)
    failures |= {cell.name: failed[name] for cell in wanted if (name := plan.run_of(cell)) in failed}
    entries = [_entry(cell, plan, folder / "measures", failures) for cell in every]
    teachers = dict.fromkeys(name for cell in every if (name := plan.teacher_of(cell)) and plan.result(name))
    report = TableReport(
        table,
        choice,
        entries,
        {name: plan.folder / name for name in teachers},
        failures,
        _command(table, choice, folder),
    )
    page = report.write(folder / f"{table.name}-{choice.scale}-{choice.recipe}")
    console.print(report.terminal())
    for text in (*report.sentences(), *(f"failed: {names}: {reason}" for reason, names in report.failed())):
        _say(console, text)
    return Outcome(page, failures)


def estimate_table(table: Table, choice: Choice, folder: Path, jobs: int = 1) -> list[str]:
    """Print what is missing of a table, how long it will take, and what cannot be run, without running it."""
    every = cells(table, choice)
    plan = Plan(every, folder / "runs")
    wanted = chosen(table, every, choice.only)
    failed = [f"failed: {cell.name}: {problem}" for cell, problem in plan.problems.items() if cell in wanted]
    missing = plan.missing(wanted)
    return failed if failed and not missing else [*failed, *estimate(plan, missing, jobs)]


def _carry_out(
    plan: Plan, missing: Mapping[str, Job], jobs: int, console: Console, executor: Executor
) -> dict[str, str]:
    """Carry out the missing runs; return the reasons of failures, by the names of the runs."""
    failures: dict[str, str] = {}
    count = itertools.count(1)

    def tell(name: str, found: Found) -> None:
        _say(console, f"  {next(count)}/{len(missing)} {name}: {accuracy(found):.2f} %")

    def note(name: str, error: Exception) -> None:
        # For unexpected errors, the type is more informative than the message.
        failures[name] = str(error) if isinstance(error, RefilledError) else f"{type(error).__name__}: {error}"
        _say(console, f"  {next(count)}/{len(missing)} {name} failed: {failures[name]}")

    needs = {name: [other for other in plan.needs.get(name, ()) if other in missing] for name in missing}
    run_grid(missing, plan.folder, jobs, tell, note, needs, executor)
    return failures


def _entry(cell: Cell, plan: Plan, kept: Path, failures: dict[str, str]) -> Entry:
    name = plan.run_of(cell)
    found = plan.result(name)
    if name is None or found is None:
        return Entry(cell)
    interval = found.interval if isinstance(found, FewShotResult) else None
    try:
        return Entry(cell, plan.folder / name, measure(cell, plan.folder / name, kept), interval)
    except RefilledError as error:
        failures[cell.name] = str(error)
        return Entry(cell)


def _command(table: Table, choice: Choice, folder: Path) -> list[str]:
    options = {"--scale": choice.scale, "--recipe": choice.recipe, "--seeds": len(choice.seeds), "--out": folder}
    return ["refilled", "reproduce", table.name, *(str(part) for option in options.items() for part in option)]


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
