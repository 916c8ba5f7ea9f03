"""The commands that repeat a run, and that compare it with students trained without its teacher."""

import shlex
from collections.abc import Iterator, Mapping, Set
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, get_args

from refilled.config import WHERE, Run
from refilled.errors import RefilledError
from refilled.methods import load_method
from refilled.models import starts_from_weights
from refilled.presets import PRESETS, WARM_START, with_preset
from refilled.runs.prepared import runs_code
from refilled.words import flag_of

_ELSEWHERE = {*WHERE} - {"data_root"}  # of another machine, they may be wrong
_OF_THE_TEACHER = {"teacher", "teacher_mean", "teacher_std", "teacher_size", "teacher_embedding"}


def command_of(run: Run) -> str:
    """Return the command that executes a run."""
    left_out, words = {"task", "settings", *_ELSEWHERE}, ["refilled", "distill", run.task]
    if run.method == "vanilla":  # `distill` would use another method
        left_out, words[1] = left_out | {"method"} | _OF_THE_TEACHER, "train"
    return shlex.join([*words, *_flags(run, left_out), *_set(run.settings)])


def comparison_of(run: Run) -> str:
    """Return the command that compares a run's method with the student alone, and all else as in the run.

    The last row has the configuration of the run, or the first if its method is ``vanilla``.
    """
    left_out = {"task", "settings", "method", "seed", "guard", *_ELSEWHERE}
    words = ["refilled", "compare", run.task, *_flags(run, left_out)]
    if run.method == "vanilla":
        words += [] if run.teacher else ["--teacher", "TEACHER"]
        return shlex.join([*words, "--methods", "vanilla,refilled:good", "--seeds", "3"])
    row, settings, guard = _row(run)
    words += ["--methods", f"vanilla,{row}", *_set(settings)]
    if guard != run.guard:
        words.append("--guard" if run.guard else "--no-guard")
    return shlex.join([*words, "--seeds", "3"])


def how_to_know(run: Run) -> str:
    """Return sentences on what one run cannot show, with the command that shows it."""
    if run.method == "vanilla":
        question, others = "Would a teacher help?", "students that learn from a teacher at equal cost"
    else:
        question = "Did the teacher help?" if run.teacher else f"Did {run.method} help?"
        others = f"students that are trained in the same way without {'the teacher' if run.teacher else 'it'}"
    return f"{question} One run cannot show it. Compare with {others}: {comparison_of(run)}"


def _flags(run: Run, left_out: Set[str]) -> Iterator[str]:
    # The command line has other defaults for these.
    always = {"epochs", *(WARM_START if starts_from_weights(run.student, run.pretrained) else ())}
    for field in fields(Run):
        value = getattr(run, field.name)
        default = None if field.default is MISSING else field.default
        if field.name in left_out or (value == default and field.name not in always):
            continue
        flag = flag_of(field.name)
        if field.name == "teacher":
            yield from (word for name in run.teachers for word in ("--teacher", name))
        elif isinstance(value, bool):
            yield flag if value else f"--no-{flag[2:]}"
        else:
            yield from (flag, *map(str, value if isinstance(value, tuple | list) else [value]))


def _set(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from (word for name, value in settings.items() for word in ("--set", f"{name}={value}"))


def _row(run: Run) -> tuple[str, dict[str, Any], bool]:
    """Return the row of ``--methods`` that is nearest to a run, the settings that it lacks, and its ``guard``.

    A file of the user is not executed; all its settings are given.
    """
    every = (run.method, dict(run.settings), False)
    if runs_code(run.method):
        return every
    try:
        rows = [(run.method, _missing(run, {}), False)]
    except RefilledError:  # another version of refilled has other parameters
        return every
    from_weights = starts_from_weights(run.student, run.pretrained)
    for name, preset in PRESETS.items():
        if preset.get("method") == run.method and "settings" in preset:
            values = {"method": run.method, "unlabelled": run.unlabelled}
            given = with_preset(name, values, from_weights=from_weights)
            rows.append((f"{run.method}:{name}", _missing(run, given["settings"]), given.get("guard", False)))
    return min(rows, key=lambda row: len(row[1]))


def _missing(run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that differ from the given ones and the defaults. A record has no None."""
    method = load_method(run.method)
    settled, own = method.settle(given), method.settle(run.settings)
    unset = {n: None for n, hint in method.types.items() if n not in run.settings and NoneType in get_args(hint)}
    return {name: value for name, value in {**own, **unset}.items() if value != settled[name]}
