"""Commands that train one student: ``train`` and ``distill``."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from refilled.cli.options import (
    AsJson,
    DryRun,
    Preset,
    Quiet,
    Ranks,
    configure,
    descriptions,
    key_value,
    run_flags,
    run_name,
)
from refilled.cli.show import carry_out, console, processes, rank, say, silent
from refilled.config import WHERE, Run
from refilled.errors import RunError

_AUTO = "auto"


@run_flags(
    "teacher", "method", "settings", "teacher_mean", "teacher_std", "teacher_size", "teacher_embedding", "student"
)
def train(
    task: Annotated[
        str, typer.Argument(help="A task, for example digits:0-4, or a folder of images.", show_default=False)
    ],
    model: Annotated[str, typer.Option("--model", "--student", help=escape(descriptions()["student"]))] = "wrn_16_1",
    out: Annotated[Path | None, typer.Option(help="Folder for the run.", show_default=False)] = None,
    preset: Preset = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    dry_run: DryRun = False,
    ranks: Ranks = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Train a model with labels only: a teacher, or a student without a teacher."""
    run = configure(preset, {"task": task, "student": model, **flags})
    if dry_run:
        _forecast(run, ranks, as_json)
        return
    _distill(run, out, overwrite, quiet, as_json)


@run_flags("task", "settings", "teacher_size")
def distill(
    context: typer.Context,
    task: Annotated[
        str | None, typer.Argument(help="A task, for example digits:5-9, or a folder of images.", show_default=False)
    ] = None,
    teacher: Annotated[str | None, typer.Option(help=escape(descriptions()["teacher"]), show_default=False)] = None,
    teacher_size: Annotated[
        str | None,
        typer.Option(
            help=escape(
                f"{descriptions()['teacher_size']} 'auto' measures a few sizes on a sample and takes the smallest "
                "that is as good as the best."
            ),
            show_default=False,
            rich_help_panel="Data, models, machine",
        ),
    ] = None,
    student: Annotated[str, typer.Option(help=escape(descriptions()["student"]))] = "wrn_16_1",
    method: Annotated[
        str, typer.Option(help="A method ('refilled list methods'), or a file that defines one.")
    ] = "refilled",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the method; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the run.", show_default=False)] = None,
    preset: Preset = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Resume the run in this folder. Only options such as --device, which do not affect the result, may "
            "be added.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    dry_run: DryRun = False,
    ranks: Ranks = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Train a student with a teacher, whose classes may differ from the student's."""
    if resume is not None:
        _resume(context, resume, quiet, as_json)
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
    if dry_run:
        _forecast(run, ranks, as_json)
        return
    _distill(run, out, overwrite, quiet, as_json)


def _size(text: str | None) -> int | None:
    if text is None or text == _AUTO:
        return None
    if not text.isascii() or not text.isdigit():
        raise RunError(f"--teacher-size takes a number of pixels, or {_AUTO}; got '{text}'")
    return int(text)


def _with_measured_size(run: Run, tell: Callable[[str], None]) -> Run:
    if processes() > 1:
        raise RunError(
            f"--teacher-size {_AUTO} measures in one process; find the size by 'refilled teachers --sizes ...' first, "
            "and give it to torchrun"
        )
    from refilled.selection.ranking import settle_size

    size, line = settle_size(run)
    tell(line)
    return replace(run, teacher_size=size)


def _distill(run: Run, folder: Path | None, overwrite: bool, quiet: bool, as_json: bool) -> None:
    from refilled.runs import experiment
    from refilled.runs.folder import RunFolder

    folder = folder or Path("runs") / run_name(run)
    if overwrite and rank() == 0:
        RunFolder(folder).overwrite()
    carry_out(lambda display: experiment.distill(run, folder, display=display), folder, quiet or as_json, as_json)


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


def _resume(context: typer.Context, folder: Path, quiet: bool, as_json: bool) -> None:
    from refilled.runs import experiment

    given = _given(context)
    allowed = (*WHERE, *experiment.NAMED, "resume", "quiet", "as_json")
    if others := [flag for name, flag in given.items() if name not in allowed]:
        movable = ", ".join(f"--{name.replace('_', '-')}" for name in WHERE)
        raise RunError(
            f"cannot change {', '.join(others)} when resuming; leave it out. {movable} may change; "
            f"{', '.join(experiment.NAMED)} may be given again if they were moved"
        )
    where = {name: context.params[name] for name in WHERE if name in given}
    named = {name: context.params[name] for name in experiment.NAMED if name in given}
    carry_out(
        lambda display: experiment.resume(folder, where=where, named=named, display=display),
        folder,
        quiet or as_json,
        as_json,
    )


def _given(context: typer.Context) -> dict[str, str]:
    """Return the parameters given on the command line, by name, as they are written there."""
    sources = {p: context.get_parameter_source(p.name) for p in context.command.params if p.name}
    given = [p for p, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    return {str(p.name): p.opts[-1] if p.param_type_name == "option" else f"the {p.name}" for p in given}
