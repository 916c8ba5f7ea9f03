"""Compare methods on a task at equal cost: one file that describes the runs, and a page with the result.

A comparison is TOML::

    title = "Birds"
    seeds = [0, 1, 2]

    [run]                       # the fields of a run that all rows share
    task = "cub100_84"
    student = "mobilenet_0.25"
    teacher = "tf_mobilenet.py:load_mobilenet:mobilenetv2_100_inat_bird"
    epochs = 40

    [rows]                      # first: the baseline; last: the row that the page is about
    vanilla = { method = "vanilla" }
    RKD = { method = "rkd" }
    ReFilled = { preset = "good", settings = { kd_temperature = 0.1 } }

A row's preset is that of ``--preset`` on the command line. An optional table ``[teacher]``, with the fields of a run,
describes a teacher that is trained first.
"""

import csv
import io
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from refilled.compare.page import (
    RowResults,
    on_the_cache,
    on_the_teacher,
    on_the_unlabelled,
    table,
    verdict,
    write_report,
)
from refilled.config import Run
from refilled.errors import RunError, unknown
from refilled.files import write_atomic
from refilled.grid.executors import Executor, processes
from refilled.grid.jobs import JobResult, accuracy
from refilled.grid.runner import run_grid
from refilled.methods import load_method
from refilled.models import starts_from_weights, trust_user_file
from refilled.presets import with_preset
from refilled.report.many import FEW_IMAGES, Leave, no_report, write_missing
from refilled.report.page import Surroundings
from refilled.runs.prepared import resolve, with_absolute_paths
from refilled.runs.result import Result
from refilled.words import count_of

PAGE = "report.html"
"""Name of the page of a comparison in its folder."""


@dataclass(frozen=True)
class Comparison:
    """Several methods on one task, each run with several seeds.

    Attributes:
        title: The heading of the page.
        run: The run that all rows share.
        rows: By name, the fields in which a row differs from ``run``.
        seeds: Seeds; every row is run once per seed.
        teacher: A teacher to train first. None: ``run`` names the teacher, or there is none.
    """

    title: str
    run: Run
    rows: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int] = (0, 1, 2)
    teacher: Run | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            raise RunError("a comparison needs at least one row")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise RunError(f"a comparison needs different seeds, not {list(self.seeds)}")
        for row in self.grid(Path()).values():
            resolve(row[self.seeds[0]])  # raises for an invalid row before anything is trained

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Read a comparison.

        Raises:
            RunError: The text is not TOML, or something in it is unknown, missing or of the wrong type.
        """
        try:
            return TypeAdapter(cls).validate_python(tomllib.loads(text), strict=False)
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise RunError(f"not a comparison: {'; '.join(problems)}") from error
        except (ValueError, RecursionError) as error:  # not TOML, or a number with thousands of digits
            raise RunError(f"not a comparison: {error}") from error

    def grid(self, folder: Path) -> dict[str, dict[int, Run]]:
        """Return the run of each row and seed. A teacher that is trained first is in ``folder/teacher``."""
        shared = self.run if self.teacher is None else replace(self.run, teacher=str(folder / "teacher"))
        return {
            name: {seed: _with(shared, {**changes, "seed": seed}) for seed in self.seeds}
            for name, changes in self.rows.items()
        }


def compare(
    comparison: Comparison,
    folder: Path,
    jobs: int = 1,
    console: Console | None = None,
    executor: Executor = processes,
    reports: bool = True,
) -> Path:
    """Execute the missing runs of a comparison, and write its table and page.

    Args:
        comparison: The comparison.
        folder: Folder of the runs and the page.
        jobs: Number of concurrent runs.
        console: Where the results are printed.
        executor: Opens the pool of workers.
        reports: Whether each run gets a report, compared with the run of the first row and the same seed.

    Returns:
        The page, ``report.html``. The same folder holds ``results.csv``, one line per run, and ``results.md``.
    """
    console = console or Console()
    grid = comparison.grid(folder)
    for run in (comparison.teacher, *(row[comparison.seeds[0]] for row in grid.values())):
        if run is not None:
            with_absolute_paths(run)  # raises if there are no such images, before anything is written
            trust_user_file(run.student)  # the page loads the trained students
    around = _surroundings(comparison, folder, jobs)
    if comparison.teacher is not None:
        console.print("training the teacher", highlight=False)
        after = {"teacher": Leave(around["teacher"])} if reports else None
        teacher = run_grid({"teacher": comparison.teacher}, folder, executor=executor, after=after)["teacher"]
        console.print(f"  teacher: {accuracy(teacher):.2f} % on its own classes", highlight=False)
    runs = {place_of(name, seed): run for name, row in grid.items() for seed, run in row.items()}
    after = {name: Leave(around[name]) for name in runs} if reports else None

    def tell(name: str, result: JobResult) -> None:
        console.print(f"  {name}: {accuracy(result):.2f} %", markup=False, highlight=False)

    run_grid(runs, folder, jobs, tell, executor=executor, after=after)
    if reports:
        failures = write_missing({folder / name: each for name, each in around.items()}, jobs, executor)
        for place, reason in failures.items():
            console.print(no_report(place, reason), markup=False, highlight=False, soft_wrap=True)
    places = {name: [folder / place_of(name, seed) for seed in row] for name, row in grid.items()}
    rows = [RowResults(name, [Result.load(place) for place in own], own) for name, own in places.items()]
    baseline, shown = rows[0], rows[-1]
    lines = table(rows, baseline)
    seeds = count_of(len(comparison.seeds), "seed")
    console.print(_terminal_table(lines, f"{comparison.title}: {seeds}, last epoch, percent"))
    sentences = [
        verdict(shown, baseline),
        *on_the_unlabelled(rows, baseline, shown),
        on_the_teacher(shown, baseline),
        *on_the_cache(shown),
    ]
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    write_atomic(folder / "results.csv", _csv(rows, comparison.seeds).encode())
    write_atomic(folder / "results.md", _markdown(lines).encode())
    write_report(folder / PAGE, comparison.title, rows, baseline, shown, sentences)
    return folder / PAGE


def _surroundings(comparison: Comparison, folder: Path, jobs: int) -> dict[str, Surroundings]:
    """Return what the report of each run says about the others, by the name of its folder."""
    alone, *others = comparison.rows
    each = Surroundings(home=f"../{PAGE}", images=FEW_IMAGES, timed=jobs == 1)
    found = {"teacher": replace(each, timed=True)} if comparison.teacher is not None else {}
    for seed in comparison.seeds:
        found[place_of(alone, seed)] = each
        against = folder / place_of(alone, seed)
        found |= {place_of(row, seed): replace(each, against=against) for row in others}
    return found


def _with(run: Run, changes: Mapping[str, Any]) -> Run:
    for name in changes:
        if name not in vars(run) and name != "preset":
            raise RunError(unknown("key", name, ["preset", *vars(run)]))
    given = {name: value for name, value in changes.items() if name != "preset"}
    from_weights = starts_from_weights(given.get("student", run.student), given.get("pretrained", run.pretrained))
    values = {"unlabelled": run.unlabelled, **given}
    changed = replace(run, **with_preset(changes.get("preset"), values, from_weights=from_weights))
    if not load_method(changed.method).ignores_teacher:
        return changed
    # The run does not depend on the teacher, so it need not be repeated for another one.
    return replace(
        changed, teacher=None, teacher_mean=None, teacher_std=None, teacher_size=None, teacher_embedding=None
    )


def place_of(row: str, seed: int) -> str:
    """Return the name of the folder of a row's run with this seed."""
    letters = "".join(c if c.isalnum() or c in ".+-" else "_" for c in row)
    return f"{letters}-s{seed}"


def _terminal_table(lines: Sequence[Mapping[str, str]], title: str) -> Table:
    shown = Table(*lines[0], title=title)
    for line in lines:
        shown.add_row(*line.values())
    return shown


def _markdown(lines: Sequence[Mapping[str, str]]) -> str:
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)


def _csv(rows: Sequence[RowResults], seeds: Sequence[int]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    stages = sorted({stage for row in rows for result in row.results for stage in result.stages})
    writer.writerow(["row", "seed", "accuracy", "ncm_accuracy", *(f"ncm_after_{s}" for s in stages), "seconds", "data"])
    for row in rows:
        for seed, result in zip(seeds, row.results, strict=True):
            after = [f"{result.stages[s]['ncm_accuracy']:.2f}" if s in result.stages else "" for s in stages]
            measures = [f"{result.accuracy:.2f}", f"{result.ncm_accuracy:.2f}", *after, f"{result.seconds:.0f}"]
            writer.writerow([row.name, seed, *measures, result.data["fingerprint"][:16]])
    return text.getvalue()
