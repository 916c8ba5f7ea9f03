"""Options shared by commands, and the flags of a configuration."""

import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from refilled.config import Run
from refilled.errors import RunError
from refilled.presets import PRESETS, WARM_START, with_preset
from refilled.recipe import Recipe

_LONGEST_TIME = 365 * 24 * 3600
_LEAST_STEPS = 1000
"""Minimum number of steps if no epochs are given; no number of epochs suits both ten images and thousands."""

MOST_JOBS = 10_000
"""The largest number of processes, cores or seeds. A mistyped larger one would only be noticed when memory ran out."""


def up_to(most: int) -> Callable[[float | None], float | None]:
    """Return a check of an option's value. A maximum of typer's would take the columns of the help text."""

    def check(value: float | None) -> float | None:
        if value is not None and value > most:
            raise typer.BadParameter(f"the number is too large; give at most {most:,}")
        return value

    return check


Folder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the run. Default: in runs/, named after the options.", show_default=False),
]
RunsOut = Annotated[
    Path | None,
    typer.Option(help="Folder for the runs and the page. Default: in runs/, named after the task.", show_default=False),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Do not show progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print only the result, as JSON.")]
NoReport = Annotated[bool, typer.Option("--no-report", help="Do not write report.html and README.md.")]
NoReports = Annotated[bool, typer.Option("--no-report", help="Write no report.html and README.md for each run.")]
Executor = Annotated[
    str, typer.Option(help="local (processes), or ray (Ray on this machine, or on the cluster at $RAY_ADDRESS).")
]
Cpus = Annotated[
    float,
    typer.Option(metavar="<float>", help="CPU cores per run or process, with Ray.", min=0.0, callback=up_to(MOST_JOBS)),
]
Gpus = Annotated[
    float,
    typer.Option(
        metavar="<float>",
        help="GPUs per run or process, with Ray; 0.5 lets two share one.",
        min=0.0,
        callback=up_to(MOST_JOBS),
    ),
]
Tracker = Annotated[
    list[str] | None,
    typer.Option("--tracker", help="Log each epoch to tensorboard, mlflow, wandb or trackio; may be repeated."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the configuration and the predicted time and memory, and exit.")
]
Ranks = Annotated[
    int, typer.Option(help="Number of processes under torchrun, for --dry-run.", min=1, callback=up_to(MOST_JOBS))
]
Preset = Annotated[
    str | None,
    typer.Option(help=f"Preset: {', '.join(PRESETS)}. Other options override its settings.", show_default=False),
]
DataRoot = Annotated[
    str | None, typer.Option(help="Folder of the data sets. Default: $REFILLED_DATA.", show_default=False)
]
TimeLimit = Annotated[
    str | None,
    typer.Option(
        help="Approximate time of the whole run, which determines the number of epochs: 90s, 30m or 1h30m.",
        show_default=False,
        rich_help_panel="Training",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Parameter of the method; may be repeated."),
]


def run_flags(*without: str, of: type = Run) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command one flag per field of a configuration, with help from its docstring.

    Args:
        without: Fields that have no flag.
        of: The class of the configuration.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        flags = [_flag(f, of) for f in fields(of) if f.name not in without and f.name not in {p.name for p in own}]
        signature = inspect.Signature([*own, *flags])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return command

    return decorate


def _flag(setting: Field[Any], of: type) -> inspect.Parameter:
    """Return the flag of a field. Its default is None, so that a preset can set the field."""
    hint = str if setting.name == "teacher" else get_type_hints(of)[setting.name]  # several if a command takes them
    parts = (hint, *get_args(hint))
    choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    description = f"{descriptions(of)[setting.name]} {_values(choices, setting.default)}".strip()
    # In 80 columns, help texts need the width that lists of choices and the negative names of switches would take.
    metavar = "NAME" if choices else "R G B" if any(get_origin(part) is tuple for part in parts) else None
    panel = "Training" if of is Run and setting.name in {f.name for f in fields(Recipe)} else "Data, models, machine"
    panel = "Switches" if hint is bool else panel
    option = typer.Option(help=escape(description), metavar=metavar, show_default=False, rich_help_panel=panel)
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[hint | None, option]
    )


def _values(choices: Sequence[str], default: object) -> str:
    """Return the choices and the default of a field in brackets; an empty text if it has neither."""
    parts = [f"one of: {', '.join(choices)}"] if choices else []
    if default is not MISSING and default is not None:
        parts.append(f"default: {('off', 'on')[default] if isinstance(default, bool) else default}")
    return f"[{'; '.join(parts)}]" if parts else ""


def descriptions(of: type = Run) -> dict[str, str]:
    """Return the help of each field of a configuration, from its docstring.

    A flag has a default instead of None. It has no sentence about the file of a configuration.
    """
    text = "\n".join(base.__doc__ or "" for base in reversed(of.__mro__[:-1]))
    lines = re.findall(r"^ +(\w+): (.+(?:\n {12,}.+)*)", text, re.MULTILINE)
    on_one_line = {name: re.sub(r"\s+", " ", text).partition(" In a file,")[0] for name, text in lines}
    return {name: text.replace("``", "'").replace("None: ", "Default: ") for name, text in on_one_line.items()}


Teachers = Annotated[
    list[str] | None,
    typer.Option(
        "--teacher",
        help=escape(f"{descriptions()['teacher']} May be repeated, for several teachers."),
        show_default=False,
    ),
]


def configure(preset: str | None, values: dict[str, Any]) -> Run:
    """Return the run that the given flags and the preset describe; flags override the preset.

    A student that starts from weights has another recipe, unless the flags or the preset choose an optimiser or a rate.
    """
    flags = {name: value for name, value in values.items() if value is not None}
    from_weights = _starts_from_weights(flags.get("student"), flags.get("pretrained", False))
    given = with_preset(preset, flags, from_weights=from_weights)
    if from_weights and not given.keys() & {"optimizer", "lr"}:
        given = {**WARM_START, **given}
    return Run(**given if "epochs" in given else {"least_steps": _LEAST_STEPS, **given})


def _starts_from_weights(student: str | None, pretrained: bool) -> bool:
    """Return whether a student starts from weights, importing torch only for a name that may be of weights."""
    if pretrained or student is None:
        return pretrained
    text = os.path.expandvars(student)
    if ":" not in text and not Path(text).is_dir():
        return False
    from refilled.models import starts_from_weights  # takes two seconds, for which no mistake should wait

    return starts_from_weights(text)


def seconds_of(text: str) -> float:
    """Return the seconds in a time such as ``90s``, ``30m``, ``1h30m`` or ``2h``.

    Raises:
        RunError: The text is not such a time.
    """
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip().lower())
    if parts is None or not any(parts.groups()):
        raise RunError(f"'{text}' is not a time; write hours, minutes and seconds as in 90s, 30m or 1h30m")
    seconds = sum(float(number or 0) * unit for number, unit in zip(parts.groups(), (3600, 60, 1), strict=True))
    if not 0 < seconds <= _LONGEST_TIME:
        raise RunError(f"the time '{text}' is out of range; give more than 0 seconds and at most a year, 8760h")
    return seconds


def key_value(text: str) -> tuple[str, str]:
    """Split ``KEY=VALUE`` into the key, with ``_`` for ``-``, and the value.

    Raises:
        RunError: There is no ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise RunError(f"'{text}' is not KEY=VALUE")
    return name.strip().replace("-", "_"), value.strip()


def run_name(run: Run) -> str:
    """Return a name for the folder of a run."""
    task = Path(run.task).name if "/" in run.task else run.task
    parts = [task, run.student or "teacher", Path(run.method).stem, f"s{run.seed}"]
    return "-".join(re.sub(r"[^\w.]+", "_", part).strip("_") for part in parts)


def given_on(context: typer.Context) -> dict[str, str]:
    """Return the parameters given on the command line, by name, as they are written there."""
    sources = {p: context.get_parameter_source(p.name) for p in context.command.params if p.name}
    given = [p for p, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    return {str(p.name): p.opts[-1] if p.param_type_name == "option" else f"the {p.name}" for p in given}
