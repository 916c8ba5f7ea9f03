"""The command ``reproduce``: the tables and figures of the paper."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from refilled.cli.options import MOST_JOBS, Cpus, DataRoot, Executor, Gpus, NoReports, up_to
from refilled.cli.show import console


def reproduce(
    table: Annotated[
        str, typer.Argument(help="Table or figure of the paper, such as table1, s1 or figure3; 'list' prints all.")
    ],
    scale: Annotated[str, typer.Option(help="Scale of the runs: smoke (minutes), mini (hours) or paper.")] = "smoke",
    recipe: Annotated[str, typer.Option(help="Training recipe: paper2020 or crd240.")] = "paper2020",
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="ROW/COLUMN", help="Cell, row (ROW) or column (/COLUMN) to fill in; may be repeated."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of runs per cell.", min=1, callback=up_to(MOST_JOBS))] = 3,
    jobs: Annotated[
        int, typer.Option(help="Number of concurrent runs, each with one thread.", min=1, callback=up_to(MOST_JOBS))
    ] = 1,
    executor: Executor = "local",
    cpus: Cpus = 1.0,
    gpus: Gpus = 0.0,
    out: Annotated[Path, typer.Option(help="Folder for the runs of all tables.")] = Path("runs/reproduce"),
    data_root: DataRoot = None,
    no_report: NoReports = False,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or mps.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the predicted time and exit.")] = False,
) -> None:
    """Reproduce a table or figure of the paper next to the published numbers.

    Repeat the command to fill in missing cells.
    """
    from refilled.grid.executors import find_executor
    from refilled.paper.cells import Choice
    from refilled.paper.fill import estimate_table, fill, find_table

    if table == "list":
        console.print(_tables())
        return
    choice = Choice(scale, recipe, tuple(range(seeds)), tuple(only or ()), data_root, device)
    if dry_run:
        for line in estimate_table(find_table(table), choice, out, jobs):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    outcome = fill(find_table(table), choice, out, jobs, console, find_executor(executor, cpus, gpus), not no_report)
    console.print(f"page: {outcome.page}", markup=False, highlight=False, soft_wrap=True)
    if outcome.failures:
        raise typer.Exit(1)


def _tables() -> Table:
    from refilled.paper.tables import TABLES

    table = Table("name", "what it is", "rows x columns")
    for of_paper in TABLES.values():
        table.add_row(of_paper.name, escape(of_paper.title), f"{len(of_paper.rows)} x {len(of_paper.columns)}")
    return table
