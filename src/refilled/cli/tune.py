"""The command ``tune``: parameters chosen on held-out images."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from refilled.cli.options import (
    AsJson,
    Out,
    Preset,
    Teachers,
    configure,
    descriptions,
    key_value,
    run_flags,
    run_name,
    up_to,
)
from refilled.cli.show import console, err, listed
from refilled.ranges import MOST
from refilled.words import count_of, printable

if TYPE_CHECKING:
    from refilled.tuning.student import Tuned


@run_flags("task", "settings", "score")
def tune(
    task: Annotated[
        str, typer.Argument(help="Task, for example digits:5-9, or a folder of images.", show_default=False)
    ],
    search: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUES",
            help="Values to try for a parameter of the method or a training option such as lr: KEY=A,B,C, "
            "KEY=LOW..HIGH or KEY=LOW..HIGH:log; may be repeated.",
            show_default=False,
        ),
    ],
    teacher: Teachers = None,
    student: Annotated[str, typer.Option(help=escape(descriptions()["student"]))] = "wrn_16_1",
    method: Annotated[
        str, typer.Option(help="Method ('refilled list methods' prints all), or a Python file that defines one.")
    ] = "refilled",
    trials: Annotated[
        int,
        typer.Option(
            help="Total number of trials, including those already in the folder.", min=1, callback=up_to(MOST)
        ),
    ] = 20,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Parameter that is not tuned; may be repeated."),
    ] = None,
    out: Out = None,
    preset: Preset = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Tune parameters on held-out training images, then train on all and test once.

    Repeat the command to resume after an interruption. Several commands with the same --out share the work.
    """
    from refilled.training.journal import Interrupted
    from refilled.tuning.student import tune as search_and_train

    settings = dict(key_value(text) for text in set_ or ())
    named = {"task": task, "teacher": teacher, "student": student, "method": method, "settings": settings}
    run = configure(preset, {**named, **flags})
    folder = out or Path("runs") / f"tune-{run_name(run)}"
    try:
        tuned = search_and_train(run, dict(key_value(text) for text in search), trials, folder, _tell_trial)
    except Interrupted as interruption:
        err.print("interrupted; the state is saved. Repeat the command to resume", markup=False)
        sys.exit(128 + interruption.number)
    if tuned is None:
        err.print("other processes are still running trials; the last one trains on all images", markup=False)
    elif as_json:
        best = {"values": tuned.values, "val_accuracy": tuned.val_accuracy, "accuracy": tuned.result.accuracy}
        print(json.dumps({**best, "run": str(tuned.folder)}))
    else:
        _print_tuned(tuned)


def _tell_trial(number: int, values: Mapping[str, Any], accuracy: float | None) -> None:
    reached = "the loss diverged" if accuracy is None else f"{accuracy:.2f} % of held-out images"
    line = f"trial {number}: {listed(values)}: {reached}"
    err.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _print_tuned(tuned: "Tuned") -> None:
    images = tuned.result.data["images"]
    table = Table(show_header=False)
    table.add_row("best values", escape(printable(listed(tuned.values))))
    table.add_row("held-out accuracy", f"{tuned.val_accuracy:.2f} %, the best of the trials")
    table.add_row("test accuracy", f"{tuned.result.accuracy:.2f} % of {count_of(images['test'], 'image')}")
    table.add_row("trained on", f"{count_of(images['train'], 'image')}, including the held-out ones")
    console.print(table)
    console.print(f"run: {tuned.folder}", markup=False, highlight=False, soft_wrap=True)
