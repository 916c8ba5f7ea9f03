"""Doubtful labels and near copies as a table for a spreadsheet, and as a page with pictures."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from PIL import Image

from refilled.data import Task
from refilled.errors import RunError
from refilled.files import spreadsheet_cell, write_atomic
from refilled.report.page import png
from refilled.selection.doubtful import Findings, Place
from refilled.words import count_of, plural, printable

COLUMNS = (
    "finding", "image", "part", "label", "suggested", "score", "suggested_probability", "group", "across_parts",
    "labels_differ", "correlation",
)  # fmt: skip

_DOUBTS, _GROUPS, _OF_A_GROUP = 200, 100, 12  # pictures of the page
_SIDE = 96  # pixels


def check_table(file: Path, overwrite: bool = False) -> None:
    """Refuse a name for the table that cannot be written, before anything is computed.

    Raises:
        RunError: It does not end in .csv, or the table or its page exists and is not to be overwritten.
    """
    if file.suffix.lower() != ".csv":
        raise RunError(f"{file} must end in .csv; the page gets the same name with .html")
    for path in (file, file.with_suffix(".html")):
        if path.is_dir() or (path.exists() and not overwrite):
            raise RunError(f"{path} exists; choose another --out, or replace it with --overwrite")


def write_findings(findings: Findings, file: Path, command: str, overwrite: bool = False) -> Path:
    """Write the table of all findings, and next to it the page of the first ones, which has pictures.

    Args:
        findings: The findings.
        file: The table, ``FILE.csv``; the page is ``FILE.html``.
        command: The command that found them.
        overwrite: Replace the files if they exist.

    Returns:
        The page.

    Raises:
        RunError: A file exists, or cannot be written.
    """
    check_table(file, overwrite)
    page = file.with_suffix(".html")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, _table(findings).encode("utf-8", "backslashreplace"))
        write_atomic(page, _page(findings, command).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise RunError(f"{error.filename or file} cannot be written: {error.strerror or error}") from error
    return page


def summary(findings: Findings) -> list[str]:
    """Return a summary of the findings, in sentences."""
    groups, across = len(findings.groups), sum(group.across for group in findings.groups)
    differ = sum(group.disagree for group in findings.groups)
    judged = count_of(findings.judged, "label")
    doubts = f"{len(findings.doubts)} of {judged} {plural(len(findings.doubts), 'is', 'are')} doubtful."
    if findings.agreement is not None:
        doubts += f" A classifier trained on other images gives {findings.agreement:.1f} % of the given labels."
    copies = f"{count_of(groups, 'group')} of near copies, {across} across parts, {differ} with different labels."
    return [doubts, copies]


def _table(findings: Findings) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, COLUMNS)
    writer.writeheader()
    for doubt in findings.doubts:
        row = {
            "suggested": spreadsheet_cell(doubt.suggested),
            "score": f"{doubt.score:.6f}",
            "suggested_probability": f"{doubt.suggested_probability:.6f}",
        }
        writer.writerow({"finding": "doubtful label", **_cells(doubt.place), **row})
    for number, group in enumerate(findings.groups, 1):
        row = {
            "group": str(number),
            "across_parts": "yes" if group.across else "no",
            "labels_differ": "yes" if group.disagree else "no",
            "correlation": f"{group.correlation:.6f}",
        }
        writer.writerows({"finding": "near copy", **_cells(place), **row} for place in group.places)
    return buffer.getvalue()


def _cells(place: Place) -> dict[str, Any]:
    return {"image": spreadsheet_cell(place.image), "part": place.part, "label": spreadsheet_cell(place.label)}


def _page(findings: Findings, command: str) -> str:
    doubts, groups = findings.doubts[:_DOUBTS], findings.groups[:_GROUPS]
    template = Environment(loader=PackageLoader("refilled.report"), autoescape=True).get_template("labels.html")
    return template.render(
        title=f"Labels of {printable(Path(findings.task.name).name.partition('@')[0])}",
        sentences=summary(findings),
        notes=[printable(note) for note in findings.notes],
        doubts=[
            {
                **_figure(findings.task, doubt.place),
                "suggested": printable(doubt.suggested),
                "score": f"{100 * doubt.score:.1f}\u00a0%",
                "probability": f"{100 * doubt.suggested_probability:.0f}\u00a0%",
            }
            for doubt in doubts
        ],
        plural=plural,
        doubts_left=len(findings.doubts) - len(doubts),
        groups=[
            {
                "heading": f"Group {number}: {', '.join(group.marks)}",
                "images": [_figure(findings.task, place) for place in _varied(group.places)],
                "left": max(0, len(group.places) - _OF_A_GROUP),
            }
            for number, group in enumerate(groups, 1)
        ],
        groups_left=len(findings.groups) - len(groups),
        pictures={},
        provenance={
            "command": printable(command),
            "network": printable(findings.network),
            "data fingerprint": findings.task.fingerprint,
            "copies": f"correlation of the pixels of {findings.limit:.3f} or more",
        },
    )


def _varied(places: Sequence[Place]) -> list[Place]:
    """Return the first images of a group, beginning with one of each part and label."""
    first = {(place.part, place.label): place for place in reversed(places)}
    ahead = set(first.values())
    return [place for wanted in (True, False) for place in places if (place in ahead) == wanted][:_OF_A_GROUP]


def _figure(task: Task, place: Place) -> dict[str, str]:
    pixels = {"train": task.train, "val": task.val, "test": task.test}[place.part].pixels[place.row : place.row + 1]
    image = Image.fromarray(pixels[0].cpu().permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((_SIDE, _SIDE))
    name = printable(place.image)
    return {
        "picture": png(image),
        "given": printable(place.label),
        "place": name if name.startswith(f"{place.part}/") else f"{place.part}: {name}",
    }
