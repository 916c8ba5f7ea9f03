"""Output of the commands: results, progress, messages."""

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refilled.words import count_of, printable

if TYPE_CHECKING:
    from refilled.runs.result import Result
    from refilled.training.progress import Display


console = Console()
err = Console(stderr=True)


def rank() -> int:
    """Return the rank of this process under torchrun; 0 without it."""
    return int(os.environ.get("RANK") or 0)


def processes() -> int:
    """Return the number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def carry_out(
    call: "Callable[[Display], Result]", folder: Path, quiet: bool, as_json: bool, trackers: Sequence[str] = ()
) -> None:
    """Execute a run, and print its progress and result; after an interruption, the command that resumes it."""
    from refilled.training.journal import Interrupted

    shown = display(quiet)
    if trackers and rank() == 0:
        from refilled.runs.tracking import Tracked

        shown = Tracked(shown, folder, trackers)
    try:
        result = call(shown)
    except Interrupted as interruption:
        command = shlex.join(
            ["refilled", "distill", "--resume", str(folder), *(f"--tracker={name}" for name in trackers)]
        )
        if rank() == 0:
            err.print(f"interrupted; the state is saved. Resume with: {command}", markup=False, soft_wrap=True)
        sys.exit(128 + interruption.number)
    if trackers and rank() == 0:
        shown.finish(result)  # type: ignore[attr-defined]
    if as_json:
        print((folder / "result.json").read_text(encoding="utf-8"), end="")
        return
    _print_result(result, folder)


def display(quiet: bool) -> "Display":
    """Return the display of progress: bars on a terminal, otherwise lines; nothing if ``quiet``."""
    from refilled.training.progress import Bars, Display, Lines

    return Display() if quiet or rank() > 0 else Bars(err) if err.is_terminal else Lines(err)


def say(text: str) -> None:
    """Print a line to standard error."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def silent(text: str) -> None:
    """Print nothing."""


def _print_result(result: "Result", folder: Path) -> None:
    images = result.data["images"]
    table = Table(show_header=False)
    part = result.data.get("scored", "test")
    when = ", after the last epoch" if (folder / "model.json").exists() else ""  # some methods do not train
    table.add_row("accuracy", f"{result.accuracy:.2f} % of {count_of(images[part], f'{part} image')}{when}")
    if result.balanced_accuracy is not None:
        table.add_row("balanced accuracy", f"{result.balanced_accuracy:.2f} %, mean over classes")
    table.add_row("nearest class mean", f"{result.ncm_accuracy:.2f} %")
    for name, measures in result.stages.items():
        table.add_row(f"  after stage {name}", f"{measures['ncm_accuracy']:.2f} %")
    classes = count_of(len(result.class_accuracies), "class")
    table.add_row("trained on", f"{count_of(images['train'], 'image')} of {classes}")
    about = result.teacher or {}
    several: Sequence[Mapping[str, Any]] = about.get("teachers", ())
    for number, each in enumerate(several or [about], start=1):
        if several:
            from refilled.runs.teachers import in_words

            table.add_row(f"teacher {number}", escape(printable(f"{each['name']}: {in_words(each)}")))
        if cached := each.get("cache"):
            accuracies = f"{cached['cached_accuracy']:.2f} % cached, {cached['live_accuracy']:.2f} % live"
            difference = f"largest difference {cached['largest_difference']:.1g} of the root mean square"
            table.add_row(
                f"  cache of teacher {number}" if several else "teacher cache",
                f"{accuracies}, of {count_of(cached['images'], 'training image')} by class mean; {difference}",
            )
    table.add_row("network", f"{result.parameters:,} parameters")
    table.add_row("time", f"{result.seconds / 60:.1f} minutes, {count_of(result.hardware['threads'], 'thread')}")
    if result.data["skipped"]:
        table.add_row("left out", f"{count_of(len(result.data['skipped']), 'unreadable image')}; see result.json")
    for note in result.data["notes"]:
        table.add_row("note", escape(printable(note)))
    console.print(table)
    console.print(f"run: {folder}", markup=False, highlight=False, soft_wrap=True)


def listed(values: Mapping[str, Any]) -> str:
    """Return ``name=value`` pairs on one line."""
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
