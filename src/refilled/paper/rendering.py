"""Rendering of a table's report: on the terminal, as CSV, Markdown, HTML, and as a picture."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader
from matplotlib.figure import Figure
from rich.table import Table as TerminalTable
from rich.text import Text

from refilled.compare.summary import spread
from refilled.fewshot.evaluation import FewShotResult
from refilled.files import write_atomic
from refilled.paper.measures import embed_test_images
from refilled.paper.report import Entry, TableReport
from refilled.report.pictures import Line, address, draw_lines, draw_scatter, svg, tsne
from refilled.runs.inference import task_of

_IN_ORDER = "rows, best first"
_GAINS = "gain over the student alone, paired by seed, with its 95 % interval"
_RANKS = "order of the rows against the paper's (Spearman)"


def write(report: TableReport, folder: Path) -> Path:
    """Write the table as files: ``results.csv``, ``results.md``, the page, and its picture if it has one.

    Returns:
        The page, ``report.html``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    drawn = _draw(report)
    if drawn is not None:
        caption, figure, numbers = drawn
        pictures[caption] = svg(figure)
        write_atomic(folder / "picture.svg", pictures[caption])
        write_atomic(folder / "picture.csv", _csv(numbers))
    write_atomic(folder / "results.csv", _csv(_records(report)))
    write_atomic(folder / "results.md", markdown(report).encode())
    write_atomic(folder / "report.html", _page(report, pictures).encode())
    return folder / "report.html"


def terminal(report: TableReport) -> TerminalTable:
    """Return the table for a terminal."""
    shown = TerminalTable("", *report.column_names(), title=Text(report.title), show_lines=True)
    for row in report.table.rows:
        cells = [report.shown(row, column) for column in report.table.columns]
        lines = [Text(f"{c.ours}\n{c.beside}" if c.beside else c.ours) if c else Text("") for c in cells]
        shown.add_row(Text(row.name), *lines)
    if any(report.ranks()):
        shown.add_row(Text(_RANKS), *report.ranks())
    return shown


def _records(report: TableReport) -> list[list[Any]]:
    """Return the lines of ``results.csv``: the headings, then one line per cell."""
    lines: list[list[Any]] = [
        ["table", "row", "column", "seed", "measure", "value", "paper", "run", "data", "scale", "recipe"]
    ]
    if report.table.mean_over == "tasks":
        lines[0] += ["interval", "tasks", "tasks per second"]
    for entry in report.entries:
        cell = entry.cell
        result = entry.result
        data = "" if result is None else result.data["fingerprint"][:16]
        value = "" if entry.value is None else f"{entry.value:.2f}"
        paper = "" if cell.paper is None else f"{cell.paper:.2f}"
        place = [report.table.name, cell.row.name, cell.column.name, cell.seed, cell.row.measure]
        source = [entry.run.name if entry.run else "", data, report.choice.scale, report.choice.recipe]
        lines.append([*place, value, paper, *source])
        if isinstance(result, FewShotResult):
            lines[-1] += [f"{entry.interval:.2f}", result.n_episodes, f"{result.tasks_per_second:.3g}"]
    return lines


def markdown(report: TableReport) -> str:
    """Return the table, its orders, its gains and its provenance as Markdown."""
    lines = [["", *report.column_names()], ["---"] * (1 + len(report.table.columns))]
    for row in report.table.rows:
        cells = [report.shown(row, column) for column in report.table.columns]
        lines.append([row.name, *("" if cell is None else str(cell) for cell in cells)])
    failed = "".join(f"* {names}: {reason}\n" for reason, names in report.failed())
    sources = "".join(f"* {name}: {value}\n" for name, value in report.provenance().items())
    parts = [f"# {report.title}\n", "\n\n".join(report.sentences()) + "\n", _markdown_table(lines)]
    if report.orders():
        heads = [_IN_ORDER, "ours", "the paper's", "Spearman"]
        orders = [[o.column, "; ".join(o.ours), "; ".join(o.papers), f"{o.correlation:+.2f}"] for o in report.orders()]
        parts.append(_markdown_table([heads, ["---"] * len(heads), *orders]))
    if report.gains():
        heads, *gains = report.gains()
        parts.append(_markdown_table([[_GAINS, *heads[1:]], ["---"] * len(heads), *gains]))
    parts += [f"Failed:\n\n{failed}"] if failed else []
    return "\n".join([*parts, sources])


def _page(report: TableReport, pictures: Mapping[str, bytes]) -> str:
    templates = ChoiceLoader([PackageLoader("refilled.paper"), PackageLoader("refilled.report")])  # page.html is there
    page = Environment(loader=templates, autoescape=True).get_template("table.html")
    return page.render(
        title=report.title,
        sentences=report.sentences(),
        columns=report.column_names(),
        lines=[(row.name, [report.shown(row, column) for column in report.table.columns]) for row in report.table.rows],
        in_order=_IN_ORDER,
        orders=report.orders(),
        gained=_GAINS,
        gains=report.gains(),
        failed=report.failed(),
        pictures={caption: address(picture) for caption, picture in pictures.items()},
        provenance=report.provenance(),
    )


def _draw(report: TableReport) -> tuple[str, Figure, list[list[Any]]] | None:
    """Return the caption, the figure and the numbers of the table's picture; None if it has none."""
    if report.table.picture == "lines" and _lines(report):
        lines = _lines(report)
        numbers = [[line.name, *point] for line in lines for point in line.points]
        return (
            f"{report.table.unit}, mean and standard deviation over seeds",
            draw_lines(lines, report.column_names(), report.table.columns_are, report.table.unit),
            [["row", report.table.columns_are, "mean", "standard deviation"], *numbers],
        )
    if report.table.picture == "t-SNE":
        embedded = [e for e in report.entries if e.cell.seed == report.choice.seeds[0] and e.value is not None]
        if len(embedded) == len(report.table.rows):
            return _scatter(embedded)
    return None


def _lines(report: TableReport) -> list[Line]:
    """Return one line per row, with the mean and the standard deviation over seeds for each column."""
    lines = []
    for row in report.table.rows:
        points = []
        for column in report.table.columns:
            values = [entry.value for entry in report.at(row, column) if entry.value is not None]
            if values:
                points.append((column.name, mean(values), spread(values)))
        if points:
            lines.append(Line(row.name, points))
    return lines


def _scatter(entries: Sequence[Entry]) -> tuple[str, Figure, list[list[Any]]]:
    """Return the caption, the figure and the numbers of the t-SNE of test images."""
    embeddings = {}
    for entry in entries:
        assert entry.run is not None  # it has a value
        embeddings[entry.cell.row.name], labels = embed_test_images(entry.cell, entry.run)
        classes = task_of(entry.run).classes
    scatter = tsne(embeddings, labels)
    numbers = [
        [name, *point, classes[label]]
        for name, points in scatter.points.items()
        for point, label in zip(points.tolist(), scatter.labels, strict=True)
    ]
    caption = "Test images of ten classes, coloured by class (t-SNE, first seed)"
    return caption, draw_scatter(scatter, classes), [["embedding", "x", "y", "class"], *numbers]


def _markdown_table(lines: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _csv(lines: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    return text.getvalue().encode()
