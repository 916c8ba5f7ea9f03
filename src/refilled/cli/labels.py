"""The command ``labels``: doubtful labels and near copies among the images of a run or a task."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len, set_cell_size

from refilled.cli.options import AsJson, Quiet, configure, run_flags, up_to
from refilled.cli.show import console, say, silent
from refilled.ranges import MOST
from refilled.recipe import Recipe
from refilled.words import count_of, printable

if TYPE_CHECKING:
    from refilled.selection.doubtful import Findings

_NOT_USED = {f.name for f in fields(Recipe)} - {"seed"}
_IMAGES_OF_A_GROUP = 4
_LONGEST = 32  # columns of the terminal for the name of a class


@run_flags(
    "student", "method", "settings", "guard", "shots", "val", "score", "pretrained", "unlabelled", "cuda_graphs",
    *_NOT_USED,
)  # fmt: skip
def labels(
    task: Annotated[
        str,
        typer.Argument(
            metavar="RUN|FOLDER",
            help="Folder of a run; with --teacher, also a folder of images or another task.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Table of all findings to write, FILE.csv; a page with pictures is written to FILE.html.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    with_test: Annotated[
        bool,
        typer.Option("--with-test", help="Also check test labels; near copies are found in all images."),
    ] = False,
    top: Annotated[
        int, typer.Option(help="Number of findings of each kind to print.", min=0, callback=up_to(MOST))
    ] = 20,
    quiet: Quiet = False,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Find doubtful labels of training images, and near copies among training and test images."""
    from refilled.report.labels import check_table, write_findings
    from refilled.runs.folder import RunFolder
    from refilled.selection.doubtful import find_doubtful, run_in

    if out is not None:
        check_table(out, overwrite)
    folder = Path(task) if RunFolder(Path(task)).begun else None
    given = {name: value for name, value in flags.items() if value is not None}
    run = configure(None, {"task": task, "val": 0.0, **given}) if folder is None else run_in(folder, given)
    findings = find_doubtful(run, with_test, silent if quiet else say, folder)
    if as_json:
        print(json.dumps(findings.to_dict()))
    else:
        _print(findings, top)
    if out is not None:
        page = write_findings(findings, out, shlex.join(["refilled", *sys.argv[1:]]), overwrite)
        if not as_json:
            console.print(f"table: {printable(str(out))}", markup=False, highlight=False, soft_wrap=True)
            console.print(f"page: {printable(str(page))}", markup=False, highlight=False, soft_wrap=True)


def _print(findings: "Findings", top: int) -> None:
    from refilled.report.labels import summary

    for note in findings.notes:
        say(f"note: {printable(note)}")
    doubts, groups = findings.doubts[:top], findings.groups[:top]
    if doubts:
        lines = [("score", "given", "suggested", "image with a doubtful label")]
        lines += [(f"{d.score:.3f}", d.place.label, d.suggested, d.place.image) for d in doubts]
        _print_columns(lines)
    for number, group in enumerate(groups, 1):
        console.print(f"near copies {number}: {', '.join(group.marks)}", markup=False, highlight=False)
        shown = group.places[:_IMAGES_OF_A_GROUP]
        _print_columns([("", place.part, place.label, place.image) for place in shown])
        if len(group.places) > len(shown):
            console.print(f"  and {len(group.places) - len(shown)} more", highlight=False)
    left = max(len(findings.doubts) - len(doubts), 0), max(len(findings.groups) - len(groups), 0)
    for sentence in summary(findings):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    if any(left):
        left_out = f"{count_of(left[0], 'label')} and {count_of(left[1], 'group')}"
        say(f"not printed: {left_out}; --out labels.csv writes all, --top prints more")


def _print_columns(lines: Sequence[Sequence[str]]) -> None:
    """Print aligned columns. Long class names are cut; paths are not, so that they can be copied."""
    texts = [[printable(text) for text in line] for line in lines]
    widths = [min(_LONGEST, max(map(cell_len, column))) for column in zip(*texts, strict=True)]
    for *first, last in texts:
        cells = [_sized(text, width) for text, width in zip(first, widths, strict=False)]
        console.print("  ".join([*cells, last]), markup=False, highlight=False, soft_wrap=True)


def _sized(text: str, width: int) -> str:
    return set_cell_size(text, width) if cell_len(text) <= width else f"{set_cell_size(text, width - 1)}…"
