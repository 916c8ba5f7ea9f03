"""The command ``teachers``: which teacher, and at which size."""

import csv
import json
import re
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from refilled.cli.options import AsJson, Quiet, configure, run_flags, up_to
from refilled.cli.show import console, say, silent
from refilled.errors import RunError
from refilled.files import spreadsheet_cell
from refilled.ranges import MOST, PIXELS
from refilled.recipe import Recipe
from refilled.words import count_of, printable

if TYPE_CHECKING:
    from refilled.selection.measures import Accuracy
    from refilled.selection.ranking import Measured, Ranking

_NOT_MEASURED = {f.name for f in fields(Recipe)} - {"seed"}


@run_flags(
    "student", "teacher", "teacher_size", "method", "settings", "guard", "score", "pretrained", "unlabelled",
    "cuda_graphs", *_NOT_MEASURED,
)  # fmt: skip
def teachers(
    task: Annotated[
        str, typer.Argument(help="Task, for example digits:5-9, or a folder of images.", show_default=False)
    ],
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            help="Teacher to measure, in any form of 'distill --teacher'; may be repeated. Default: four timm models, "
            "which need --download unless they are on this machine.",
            show_default=False,
        ),
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            help="Input sizes in pixels to measure each candidate at, for example 96,128,160; may be repeated.",
            show_default=False,
        ),
    ] = None,
    sample: Annotated[
        int, typer.Option(help="Maximum number of training images to embed.", min=20, callback=up_to(MOST))
    ] = 2000,
    download: Annotated[bool, typer.Option("--download", help="Download the default candidates.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one CSV row per candidate and size.")] = False,
    **flags: Any,
) -> None:
    """Rank teachers by how well they separate your classes, with cost and forecast gain."""
    if as_json and as_csv:
        raise RunError("--json and --csv cannot be combined; give one of them")
    sides = _sizes_in(sizes or [])
    run = configure(None, {"task": task, **flags})
    from refilled.selection.candidates import DEFAULT, downloads_of, refuse_offline
    from refilled.selection.ranking import rank_teachers

    chosen = candidates or list(DEFAULT)
    downloads = downloads_of(chosen)
    refuse_offline(downloads)
    if downloads:
        say(f"weights to download: {', '.join(map(str, downloads))}")
        if not candidates and not download:
            raise RunError("add --download to download them, or name your own teachers with --candidates")
    ranking = rank_teachers(run, chosen, sides, sample, silent if quiet else say)
    if as_json:
        print(json.dumps(ranking.to_dict()))
    elif as_csv:
        _print_csv(ranking)
    else:
        _print(ranking)


def _sizes_in(texts: list[str]) -> list[int]:
    numbers = [part for text in texts for part in re.split(r"[,\s]+", text) if part]
    for number in numbers:
        if not re.fullmatch(r"[1-9][0-9]{0,3}", number) or int(number) not in PIXELS:
            raise RunError(
                f"'{number}' is not a size in pixels; give numbers from 1 to {PIXELS.most} such as --sizes 96,128,160"
            )
    return sorted({int(number) for number in numbers})


def _print(ranking: "Ranking") -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))  # all columns fit a terminal of 80 characters
    table.add_column("teacher", overflow="fold", min_width=12)
    headings = ("size", "class\nmeans, %", "linear\nprobe, %", "label\ninfo", "LogME", "GMAC", "ms", "fore-\ncast")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for one in ranking.candidates:
        table.add_row(*_cells(one))
    console.print(table)
    one_fold = f"{ranking.images} images of {ranking.classes} classes, held-out folds (95 % interval)"
    console.print(f"{printable(ranking.task)}: {one_fold}", markup=False, highlight=False, soft_wrap=True)
    pixels = f"nearest class mean of the pixels: {_accuracy(ranking.pixels)} %"
    labels = count_of(round(ranking.labels_per_class), "label")
    console.print(f"{pixels}; {labels} per class", markup=False, soft_wrap=True)
    for one in ranking.candidates:
        notes = [*([one.fault] if one.fault else []), *one.notes]
        for note in notes:
            say(f"{'unusable' if one.unusable else 'note'}: {printable(one.candidate)}: {printable(note)}")
    for candidate, size in ranking.sizes.items():
        text = f"smallest size within one standard error of the best, for {printable(candidate)}: {size} pixels"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if any(one.extrapolated for one in ranking.candidates):
        say("note: the forecast was not fitted to this number of labels per class")
    console.print(printable(ranking.verdict), style="bold", markup=False, highlight=False, soft_wrap=True)


def _cells(one: "Measured") -> list[str]:
    name = escape(printable(_short(one.candidate)))
    size = "" if one.size is None else str(one.size)
    if one.nearest_class_mean is None or one.linear_probe is None or one.cost is None:
        return [name, size, "unusable"]
    operations = one.cost.multiplications
    return [
        name,
        size,
        escape(_accuracy(one.nearest_class_mean)),
        escape(_accuracy(one.linear_probe)),
        f"{one.label_information:.2f}",
        f"{one.logme:.3f}",
        "?" if operations is None else f"{operations / 1e9:.3g}",
        f"{one.cost.milliseconds:.3g}",
        "ignored" if one.fault else f"{one.gain:+.1f}",
    ]


def _accuracy(found: "Accuracy") -> str:
    return f"{found.percent:.1f} ({found.low:.0f}–{found.high:.0f})"


def _short(candidate: str) -> str:
    """Leave out the folders of a Python file."""
    return re.sub(r"^.*[/\\](?=[^/\\]+\.py:)", "", candidate)


def _print_csv(ranking: "Ranking") -> None:
    writer = csv.writer(sys.stdout)
    accuracies = [f"{name}{end}" for name in ("nearest_class_mean", "linear_probe") for end in ("", "_low", "_high")]
    rest = ["label_information", "logme", "multiplications", "milliseconds", "gain", "error", "unusable", "fault"]
    writer.writerow(["candidate", "size", *accuracies, *rest])
    for one in ranking.candidates:
        row: list[Any] = [spreadsheet_cell(one.candidate), one.size]
        for found in (one.nearest_class_mean, one.linear_probe):
            row += [None] * 3 if found is None else [f"{x:.2f}" for x in (found.percent, found.low, found.high)]
        cost = (None, None) if one.cost is None else (one.cost.multiplications, one.cost.milliseconds)
        writer.writerow(
            [
                *row,
                one.label_information,
                one.logme,
                *cost,
                one.gain,
                ranking.error,
                one.unusable,
                spreadsheet_cell(one.fault or ""),
            ]
        )
