"""Commands that compare methods: ``compare`` and ``demo``."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from refilled.cli.options import (
    MOST_JOBS,
    Cpus,
    Executor,
    Gpus,
    NoReports,
    Preset,
    RunsOut,
    Teachers,
    configure,
    descriptions,
    given_on,
    key_value,
    run_flags,
    run_name,
    up_to,
)
from refilled.cli.show import console
from refilled.config import WHERE
from refilled.errors import RefilledError, RunError
from refilled.presets import with_preset
from refilled.words import flag_of

if TYPE_CHECKING:
    from refilled.compare.comparison import Comparison
    from refilled.grid import executors


_BESIDE_A_FILE = ("task", "out", "jobs", "executor", "cpus", "gpus", "no_report", "dry_run")
"""Parameters of ``compare`` that say nothing about the runs themselves."""


@run_flags("task", "method", "settings", "seed")
def compare(
    context: typer.Context,
    task: Annotated[
        str,
        typer.Argument(help="Task, folder of images, or FILE.toml that describes a comparison.", show_default=False),
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, separated by commas; the first is the baseline. METHOD:PRESET uses the preset's settings "
            "of the method. Default: vanilla, rkd, refilled and refilled:PRESET, with the preset of --preset or "
            "else good.",
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A parameter of the last method of --methods; may be repeated."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of runs per method.", min=1, callback=up_to(MOST_JOBS))] = 3,
    teacher: Teachers = None,
    student: Annotated[str, typer.Option(help=escape(descriptions()["student"]))] = "wrn_16_1",
    out: RunsOut = None,
    jobs: Annotated[
        int,
        typer.Option(help="Number of concurrent runs; combine it with --threads 1.", min=1, callback=up_to(MOST_JOBS)),
    ] = 1,
    executor: Executor = "local",
    cpus: Cpus = 1.0,
    gpus: Gpus = 0.0,
    preset: Preset = None,
    no_report: NoReports = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the predicted time and exit.")] = False,
    **flags: Any,
) -> None:
    """Compare methods at equal cost over several seeds, to see whether the teacher helps."""
    from refilled.compare.comparison import Comparison
    from refilled.grid.executors import find_executor
    from refilled.models import starts_from_weights

    pool = find_executor(executor, cpus, gpus)
    if task.endswith(".toml"):
        text = _read(Path(task))
        try:
            comparison = Comparison.from_toml(text)
        except RefilledError as error:
            raise RunError(f"{task}: {error}") from error
        comparison = _changed(comparison, context)
        out = out or Path("runs") / Path(task).stem
    else:
        # All rows use the preset's training; only the row that names the preset uses its settings.
        run = replace(configure(preset, {"task": task, "teacher": teacher, "student": student, **flags}), settings={})
        names = methods or f"vanilla,rkd,refilled,refilled:{preset or 'good'}"
        warm = starts_from_weights(run.student, run.pretrained)
        rows = {name: _row(name, flags, warm) for name in names.split(",")}
        last = list(rows.values())[-1]
        last["settings"] = {**last["settings"], **dict(key_value(text) for text in set_ or ())}
        comparison = Comparison(f"{task}: does the teacher help?", run, rows, range(seeds))
        out = out or Path("runs") / run_name(replace(run, method="compare"))  # a run with labels only is "vanilla"
    if dry_run:
        from refilled.cost.comparison import forecast_comparison

        for line in forecast_comparison(comparison, out, jobs):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    _compare(comparison, out, jobs, pool, not no_report)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the page.")] = Path("runs/demo"),
    jobs: Annotated[
        int, typer.Option(help="Number of concurrent runs, each with one thread.", min=1, callback=up_to(MOST_JOBS))
    ] = 2,
) -> None:
    """Run a comparison that takes one to two minutes: a teacher of letters, students of digits."""
    from importlib.resources import files

    from refilled.compare.comparison import Comparison
    from refilled.grid.executors import processes

    comparison = Comparison.from_toml((files("refilled.compare") / "demo.toml").read_text(encoding="utf-8"))
    console.print(
        "The teacher knows printed letters but no digits. The students learn handwritten digits from "
        f"{comparison.run.shots} labelled images per class, all at equal cost.",
        highlight=False,
    )
    _compare(comparison, out, jobs, processes)


def _compare(
    comparison: "Comparison", folder: Path, jobs: int, executor: "executors.Executor", reports: bool = True
) -> None:
    from refilled.compare.comparison import compare as carry_out

    page = carry_out(comparison, folder, jobs, console, executor, reports)
    console.print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)


def _changed(comparison: "Comparison", context: typer.Context) -> "Comparison":
    """Return a comparison from a file with the options of the command line that may change it."""
    given = given_on(context)
    if others := [flag for name, flag in given.items() if name not in (*WHERE, "seeds", *_BESIDE_A_FILE)]:
        which = ", ".join(map(flag_of, ("seeds", *WHERE)))
        named = ", ".join(others)
        raise RunError(f"the file describes the runs, so change it instead of giving {named}. {which} may be given")
    where = {name: context.params[name] for name in WHERE if name in given}
    return replace(
        comparison,
        run=replace(comparison.run, **where),
        teacher=None if comparison.teacher is None else replace(comparison.teacher, **where),
        seeds=range(context.params["seeds"]) if "seeds" in given else comparison.seeds,
    )


def _row(name: str, flags: Mapping[str, Any], from_weights: bool) -> dict[str, Any]:
    """Return a row of the comparison, METHOD, METHOD:PRESET or the path of a file."""
    method, preset = (name, "") if name.endswith(".py") else name.partition(":")[::2]
    given = {"method": method, "unlabelled": flags["unlabelled"]}
    fields = with_preset(preset or None, given, from_weights=from_weights)
    guard = fields.get("guard", False) if flags["guard"] is None else flags["guard"]
    return {"method": method, "settings": dict(fields.get("settings", {})), "guard": guard}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
