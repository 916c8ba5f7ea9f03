"""Write docs/all-results.md from the raw results: python docs/build_results.py.

The figures come from docs/results/*.csv, the titles and commands from docs/comparisons/*.toml, and the words from
docs/results/about.toml.
"""

import csv
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from refilled.compare.summary import Gain, mean_and_spread, paired_gain

DOCS = Path(__file__).parent
PAGE = DOCS / "all-results.md"
HEAD = """\
<!-- Written by `python docs/build_results.py`; edit docs/results/about.toml or the raw results instead. -->

# All results

Test accuracy in percent after the last epoch, mean ± standard deviation over seeds. Gains are paired by seed and carry
their 95 % interval (Student's t). "Nearest class mean" classifies the test images by the class means of the training
images in the student's embedding. The test part is scored once, at the end. [Results](results.md) is the summary.

Commands expect the data root in `REFILLED_DATA`.
"""

Seeds = dict[str, float]
"""A figure for each seed."""


@dataclass
class Row:
    """One row of a comparison, seed by seed."""

    accuracy: Seeds = field(default_factory=dict)
    ncm: Seeds = field(default_factory=dict)
    after_stage_1: list[float] = field(default_factory=list)


def lines_of(name: str) -> list[dict[str, str]]:
    """Read a file of raw results."""
    with (DOCS / "results" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def is_comparison(lines: Sequence[Mapping[str, str]]) -> bool:
    """Whether the lines are those that `refilled compare` writes."""
    return "ncm_accuracy" in lines[0]


def comparison_rows(lines: Sequence[Mapping[str, str]]) -> dict[str, Row]:
    """Gather the lines of each row, in the order of the file."""
    rows: dict[str, Row] = {}
    for line in lines:
        row = rows.setdefault(line["row"], Row())
        row.accuracy[line["seed"]] = float(line["accuracy"])
        row.ncm[line["seed"]] = float(line["ncm_accuracy"])
        if line.get("ncm_after_embedding"):
            row.after_stage_1.append(float(line["ncm_after_embedding"]))
    return rows


def table_cells(lines: Sequence[Mapping[str, str]]) -> dict[tuple[str, str], Seeds]:
    """Return the figures of a table of the paper by row and column."""
    cells: dict[tuple[str, str], Seeds] = {}
    for line in lines:
        if line["value"]:
            cells.setdefault((line["row"], line["column"]), {})[line["seed"]] = float(line["value"])
    return cells


def gain_of(ours: Seeds, theirs: Seeds) -> Gain | None:
    """Compare two rows on the seeds that both have; None if there are none."""
    seeds = [seed for seed in ours if seed in theirs]
    return paired_gain([ours[s] for s in seeds], [theirs[s] for s in seeds]) if seeds else None


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Write a table, the first row as its head."""
    head, *body = rows
    lines = ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def _written(gain: Gain | None) -> str:
    return "" if gain is None else str(gain).replace(", one seed, not established", ", one seed")


def comparison_table(about: Mapping[str, object], rows: Mapping[str, Row]) -> str:
    """Write the table of a comparison."""
    first = str(about.get("baseline", next(iter(rows))))
    baseline = _elsewhere(first) if ": " in first else rows[first].accuracy
    own: Mapping[str, str] = about.get("baselines", {})  # type: ignore[assignment]
    staged = any(row.after_stage_1 for row in rows.values())
    table = [["row", "seeds", "accuracy", "nearest class mean", *(["after stage 1"] if staged else []), "gain"]]
    for name, row in rows.items():
        gain = None if name == first else gain_of(row.accuracy, rows[own[name]].accuracy if name in own else baseline)
        stage = [mean_and_spread(row.after_stage_1) if row.after_stage_1 else ""] if staged else []
        figures = [mean_and_spread(list(row.accuracy.values())), mean_and_spread(list(row.ncm.values()))]
        table.append([name, str(len(row.accuracy)), *figures, *stage, _written(gain)])
    return markdown(table)


def _elsewhere(place: str) -> Seeds:
    name, _, row = place.partition(": ")
    return comparison_rows(lines_of(name))[row].accuracy


def paper_table(about: Mapping[str, object], lines: Sequence[Mapping[str, str]]) -> str:
    """Write a table of the paper: one column with gains, or several with the paper's numbers in brackets."""
    cells = table_cells(lines)
    paper = {(line["row"], line["column"]): line["paper"] for line in lines}
    columns = list(dict.fromkeys(column for _, column in cells))
    names = list(dict.fromkeys(row for row, _ in cells))
    if "interval" in lines[0]:
        wide = {(ln["row"], ln["column"]): f"{ln['value']} ± {ln['interval']}" for ln in lines if ln["value"]}
        return _wide(names, columns, wide, paper) + "\n\n" + times_table(names, columns, lines)
    if len(columns) > 2:
        return _wide(names, columns, {k: mean_and_spread(list(v.values())) for k, v in cells.items()}, paper)
    table = [["row", "column", "seeds", "ours", "the paper's", "gain"]]
    for (row, column), seeds in cells.items():
        first = (str(about.get("baseline", names[0])), column)
        gain = gain_of(seeds, cells[first]) if first in cells and first != (row, column) else None
        table.append(
            [row, column, str(len(seeds)), mean_and_spread(list(seeds.values())), paper[row, column], _written(gain)]
        )
    return markdown(table)


def _wide(
    names: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[str, str], str],
    paper: Mapping[tuple[str, str], str],
    heading: str = "",
) -> str:
    def cell(row: str, column: str) -> str:
        published = paper.get((row, column))
        return cells.get((row, column), "") + (f" ({published})" if published and (row, column) in cells else "")

    return markdown([[heading, *columns], *([name, *(cell(name, column) for column in columns)] for name in names)])


def times_table(names: Sequence[str], columns: Sequence[str], lines: Sequence[Mapping[str, str]]) -> str:
    """Write how long 600 tasks of each few-shot method take, at the rate at which its tasks were carried out."""
    seconds = {
        (ln["row"], ln["column"]): 600 / float(ln["tasks per second"]) for ln in lines if ln.get("tasks per second")
    }
    if not seconds:
        return ""

    written = {cell: f"{took:.1f} s" if took < 60 else f"{took / 60:.1f} min" for cell, took in seconds.items()}
    return _wide(names, columns, written, {}, "600 tasks take")


def shots_table(lines: Sequence[Mapping[str, str]]) -> str:
    """Write a test of few-shot methods, one column for each number of shots."""
    cells = {(line["method"], line["shots"]): f"{line['accuracy']} ± {line['interval']}" for line in lines}
    shots = list(dict.fromkeys(line["shots"] for line in lines))
    methods = list(dict.fromkeys(line["method"] for line in lines))
    return markdown([["shots", *shots], *([m, *(cells.get((m, s), "") for s in shots)] for m in methods)])


def section(about: Mapping[str, object]) -> str:
    """Write one file of raw results: title, words, command, table, sources."""
    name = str(about["name"])
    lines = lines_of(name)
    comparison = DOCS / "comparisons" / f"{name}.toml"
    written = tomllib.loads(comparison.read_text(encoding="utf-8")) if comparison.exists() else {}
    title = str(about.get("title") or written["title"])
    command = about.get("command") or (f"refilled compare docs/comparisons/{name}.toml --jobs 2" if written else None)
    if is_comparison(lines):
        table = comparison_table(about, comparison_rows(lines))
    else:
        table = paper_table(about, lines) if "row" in lines[0] else shots_table(lines)
    prints = ", ".join(f"`{data}`" for data in dict.fromkeys(line["data"] for line in lines))
    parts = [
        f"### {title}",
        str(about.get("text", "")).strip(),
        f"```sh\n{command}\n```" if command else "",
        table,
        f"Raw results: [{name}.csv](results/{name}.csv). Data fingerprints: {prints}.",
    ]
    return "\n\n".join(part for part in parts if part)


def about_results() -> list[dict[str, object]]:
    """Return the parts of the page, in its order."""
    parts: list[dict[str, object]] = tomllib.loads((DOCS / "results" / "about.toml").read_text(encoding="utf-8"))[
        "part"
    ]
    return parts


def build() -> str:
    """Return the page."""

    def parts() -> Iterator[str]:
        yield HEAD
        for part in about_results():
            yield f"## {part['title']}\n\n{str(part['text']).strip()}\n"
            for about in part["result"]:  # type: ignore[attr-defined]
                yield section(about) + "\n"

    return "\n".join(parts())


if __name__ == "__main__":
    PAGE.write_text(build(), encoding="utf-8")
