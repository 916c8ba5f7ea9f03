"""Commands that train one student: ``train`` and ``distill``."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from refilled.cli.options import (
    AsJson,
    DryRun,
    NoReport,
    Out,
    Preset,
    Quiet,
    Ranks,
    Set,
    Teachers,
    TimeLimit,
    Tracker,
    configure,
    descriptions,
    given_on,
    key_value,
    run_flags,
    run_name,
    seconds_of,
)
from refilled.cli.report import report_after
from refilled.cli.show import carry_out, console, processes, rank, say, silent
from refilled.config import WHERE, Run
from refilled.errors import RunError
from refilled.words import flag_of

_AUTO = "auto"


@run_flags(
    "teacher", "method", "settings", "teacher_mean", "teacher_std", "teacher_size", "teacher_embedding", "student"
)
def train(
    task: Annotated[
        str, typer.Argument(help="Task, for example digits:0-4, or a folder of images.", show_default=False)
    ],
    model: Annotated[str, typer.Option("--model", "--student", help=escape(descriptions()["student"]))] = "wrn_16_1",
    out: Out = None,
    preset: Preset = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run in the folder.")] = False,
    time_limit: TimeLimit = None,
    dry_run: DryRun = False,
    ranks: Ranks = 1,
    tracker: Tracker = None,
    no_report: NoReport = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Train a model on labels only: a teacher, or a student without a teacher."""
    run = configure(preset, {"task": task, "student": model, **flags})
    run = _within(run, time_limit, flags, silent if quiet or as_json else say)
    if dry_run:
        _forecast(run, ranks, as_json)
        return
    _distill(run, out, overwrite, no_report, quiet, as_json, tracker or ())


@run_flags("task", "settings", "teacher_size")
def distill(
    context: typer.Context,
    task: Annotated[
        str | None, typer.Argument(help="Task, for example digits:5-9, or a folder of images.", show_default=False)
    ] = None,
    teacher: Teachers = None,
    teacher_size: Annotated[
        str | None,
        typer.Option(
            help=escape(
                f"{descriptions()['teacher_size']} 'auto' measures a few sizes on a sample and selects the smallest "
                "one within one standard error of the best."
            ),
            show_default=False,
            rich_help_panel="Data, models, machine",
        ),
    ] = None,
    student: Annotated[str, typer.Option(help=escape(descriptions()["student"]))] = "wrn_16_1",
    method: Annotated[
        str, typer.Option(help="Method ('refilled list methods' prints all), or a Python file that defines one.")
    ] = "refilled",
    set_: Set = None,
    out: Out = None,
    preset: Preset = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Resume the run in this folder. Only options that do not affect the result, such as --device, may be "
            "added.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run in the folder.")] = False,
    time_limit: TimeLimit = None,
    dry_run: DryRun = False,
    ranks: Ranks = 1,
    tracker: Tracker = None,
    no_report: NoReport = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Train a student with one or more teachers, whose classes may differ from the student's."""
    if resume is not None:
        _resume(context, resume, no_report, quiet, as_json, tracker or ())
        return
    if task is None:
        raise RunError(
            "name a task or a folder of images, for example refilled distill photos/ --teacher timm/resnet50"
        )
    settings = dict(key_value(text) for text in set_ or ())
    named = {"task": task, "teacher": teacher, "student": student, "method": method, "settings": settings}
    run = configure(preset, {**named, "teacher_size": _size(teacher_size), **flags})
    if teacher_size == _AUTO:
        run = _with_measured_size(run, silent if quiet or as_json else say)
    run = _within(run, time_limit, flags, silent if quiet or as_json else say)
    if dry_run:
        _forecast(run, ranks, as_json)
        return
    _distill(run, out, overwrite, no_report, quiet, as_json, tracker or ())


def _size(text: str | None) -> int | None:
    if text is None or text == _AUTO:
        return None
    if not text.isascii() or not text.isdigit():
        raise RunError(f"--teacher-size takes a number of pixels, or {_AUTO}; got '{text}'")
    return int(text[:9])  # more digits are out of range anyhow


def _with_measured_size(run: Run, tell: Callable[[str], None]) -> Run:
    if processes() > 1:
        raise RunError(
            f"--teacher-size {_AUTO} measures in one process; find the size with 'refilled teachers --sizes ...', and "
            "pass it to torchrun"
        )
    if len(run.teachers) > 1:
        raise RunError(
            f"--teacher-size {_AUTO} measures one teacher; measure each with 'refilled teachers --candidates ... "
            "--sizes ...', and give a number of pixels that suits all"
        )
    from refilled.selection.ranking import settle_size

    size, line = settle_size(run)
    tell(line)
    return replace(run, teacher_size=size)


def _within(run: Run, limit: str | None, flags: dict[str, Any], tell: Callable[[str], None]) -> Run:
    """Return the run with the number of epochs that fits the time limit, if there is one."""
    if limit is None:
        return run
    seconds = seconds_of(limit)
    if any(flags.get(name) is not None for name in ("epochs", "least_steps")):
        raise RunError("--time-limit chooses the number of epochs; leave out --epochs and --least-steps")
    if processes() > 1:
        raise RunError(
            "--time-limit does not work under torchrun, where each process would choose its own epochs; give --epochs"
        )
    from refilled.cost.budget import within

    run, line = within(run, seconds)
    tell(line)
    return run


def _distill(
    run: Run,
    folder: Path | None,
    overwrite: bool,
    no_report: bool,
    quiet: bool,
    as_json: bool,
    trackers: Sequence[str],
) -> None:
    from refilled.runs import experiment
    from refilled.runs.folder import RunFolder

    folder = folder or Path("runs") / run_name(run)
    if trackers:
        from refilled.runs.tracking import check_trackers

        check_trackers(trackers)  # before anything is removed
    if overwrite and rank() == 0:
        RunFolder(folder).overwrite()
    after = None if no_report else report_after
    carry_out(
        lambda display: experiment.distill(run, folder, display=display, after=after),
        folder,
        quiet or as_json,
        as_json,
        trackers,
    )


def _forecast(run: Run, ranks: int, as_json: bool) -> None:
    from refilled.cost.run import forecast

    predicted = forecast(run, ranks)
    if as_json:
        print(json.dumps(predicted.to_dict()))
        return
    console.print(predicted.run.to_toml(), end="", markup=False, highlight=False, soft_wrap=True)
    table = Table(show_header=False)
    for heading, text in predicted.rows():
        table.add_row(heading, escape(text))
    console.print(table)


def _resume(
    context: typer.Context, folder: Path, no_report: bool, quiet: bool, as_json: bool, trackers: Sequence[str]
) -> None:
    from refilled.runs import experiment

    given = given_on(context)
    allowed = (*WHERE, *experiment.NAMED, "resume", "tracker", "no_report", "quiet", "as_json")
    if others := [flag for name, flag in given.items() if name not in allowed]:
        movable = ", ".join(map(flag_of, WHERE))
        raise RunError(
            f"cannot change {', '.join(others)} when resuming; leave it out. {movable} may change; "
            f"{', '.join(experiment.NAMED)} may be given again if they were moved"
        )
    where = {name: context.params[name] for name in WHERE if name in given}
    after = None if no_report else report_after
    named = {name: context.params[name] for name in experiment.NAMED if name in given}
    carry_out(
        lambda display: experiment.resume(folder, where=where, named=named, display=display, after=after),
        folder,
        quiet or as_json,
        as_json,
        trackers,
    )
