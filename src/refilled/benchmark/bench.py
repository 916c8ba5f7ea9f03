"""Carry out a table or figure of the paper, and set what came out beside what the paper prints."""

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console

from refilled.benchmark.cells import Cell, Choice, Plan, cells, chosen
from refilled.benchmark.estimate import Work, images_per_second, keeps_embeddings
from refilled.benchmark.executors import Executor, processes
from refilled.benchmark.few_shot_estimate import FewShotWork, meta_tasks_per_second, tasks_per_second
from refilled.benchmark.jobs import FewShotTest, Found, Job, accuracy
from refilled.benchmark.measures import measure
from refilled.benchmark.runner import run_grid
from refilled.benchmark.summary import count_of
from refilled.benchmark.table_report import Entry, TableReport
from refilled.benchmark.tables import TABLES, Table
from refilled.data import TaskSize, task_size
from refilled.errors import RefilledError, RunError, unknown
from refilled.experiment import find_cache
from refilled.fewshot.evaluation import FewShotResult
from refilled.forecast import duration
from refilled.run import MetaRun, Run

_SHORT = 3  # seconds; what takes less is not told one by one


@dataclass(frozen=True)
class Outcome:
    """What became of a table.

    Attributes:
        page: The page that shows it.
        failures: Why cells failed, by the cell's name.
    """

    page: Path
    failures: Mapping[str, str]


def find_table(name: str) -> Table:
    """Find a table or figure of the paper.

    Raises:
        RunError: There is none of this name.
    """
    if name not in TABLES:
        raise RunError(unknown("table", name, TABLES))
    return TABLES[name]


def bench(
    table: Table,
    choice: Choice,
    folder: Path,
    jobs: int = 1,
    console: Console | None = None,
    executor: Executor = processes,
) -> Outcome:
    """Carry out what is missing of a table, and write it down beside the paper's numbers.

    Runs lie in ``folder/runs`` and are shared by all tables; what is written about the table lies in
    ``folder/<table>-<scale>-<recipe>``. Several processes may be at it at once, for the same table or others. A cell
    that fails leaves the others alone.

    Raises:
        RefilledError: Something that concerns more than single cells, such as missing data; nothing has begun then.
    """
    console = console or Console()
    every = cells(table, choice)
    plan = Plan(every, folder / "runs")
    wanted = chosen(table, every, choice.only)
    missing = plan.missing(wanted)
    seeds = count_of(len({cell.seed for cell in every}), "seed")
    _say(console, f"{table.title}: scale {choice.scale}, recipe {choice.recipe}, {seeds}")
    for line in estimate(plan, missing, jobs):
        _say(console, line)
    failures = {cell.name: str(problem) for cell, problem in plan.problems.items() if cell in wanted}
    failed = _carry_out(plan, missing, jobs, console, executor)
    failures |= {cell.name: failed[name] for cell in wanted if (name := plan.run_of(cell)) in failed}
    entries = [_entry(cell, plan, folder / "measures", failures) for cell in every]
    teachers = dict.fromkeys(name for cell in every if (name := plan.teacher_of(cell)) and plan.result(name))
    report = TableReport(
        table,
        choice,
        entries,
        {name: plan.folder / name for name in teachers},
        failures,
        _command(table, choice, folder),
    )
    page = report.write(folder / f"{table.name}-{choice.scale}-{choice.recipe}")
    console.print(report.terminal())
    for text in (*report.sentences(), *(f"failed: {names}: {reason}" for reason, names in report.failed())):
        _say(console, text)
    return Outcome(page, failures)


def estimate_table(table: Table, choice: Choice, folder: Path, jobs: int = 1) -> list[str]:
    """Say what of a table is missing and how long it will take, and what cannot be done, without doing it."""
    every = cells(table, choice)
    plan = Plan(every, folder / "runs")
    wanted = chosen(table, every, choice.only)
    failed = [f"failed: {cell.name}: {problem}" for cell, problem in plan.problems.items() if cell in wanted]
    missing = plan.missing(wanted)
    return failed if failed and not missing else [*failed, *estimate(plan, missing, jobs)]


def estimate(plan: Plan, missing: Mapping[str, Job], jobs: int) -> list[str]:
    """Say how long the missing runs of a plan will take on this machine, from a few steps of each kind.

    Raises:
        TaskError: The images of a run are missing or damaged.
    """
    if not missing:
        return ["nothing is left to do"]
    kinds = [*_trainings(plan, missing), *_few_shot(plan, missing)]
    total = duration(sum(kind.seconds for kind in kinds) / jobs)
    first = f"{count_of(len(missing), 'run')} to do, about {total} in {count_of(jobs, 'process')}:"
    long = [kind for kind in kinds if kind.seconds >= _SHORT * kind.number]
    others = sum(kind.number for kind in kinds if kind not in long)
    return [first, *map(str, long), *([f"  {others} of a few seconds each"] if others else [])]


@dataclass(frozen=True)
class _Kind:
    """Work of a kind that is still to be done."""

    what: Work | FewShotWork
    number: int
    speed: str
    seconds: float
    """Of all of it, one after the other."""

    def __str__(self) -> str:
        return f"  {self.number} x {self.what}: {self.speed}, {duration(self.seconds / self.number)} each"


def _trainings(plan: Plan, missing: Mapping[str, Job]) -> list[_Kind]:
    runs: Counter[Work] = Counter()
    images: Counter[Work] = Counter()
    trainings = {name: job for name, job in missing.items() if isinstance(job, Run)}
    kept = set()  # what teachers say once for all runs
    for name, run in trainings.items():
        size = _size_of(run)
        teacher = None if run.teacher is None else _network(plan, run.teacher)
        # A method without a student of its own trains the teacher's network, or nothing: that costs no more.
        network, taught_by = (run.student, teacher) if run.student else (teacher, None)
        assert network is not None  # every run has one of the two
        if taught_by is not None and keeps_embeddings(run, network, taught_by):
            views = (plan.needs[name], run.task, run.shots and (run.shots, run.seed), run.views)
            left = 0.0 if views in kept else _left_to_embed(run)
            if left:
                embedding = Work(taught_by, None, size.image_size, run.batch_size, trains=False)
                runs[embedding] += 1
                images[embedding] += round(left * (run.views or 0) * size.train)
            kept.add(views)
            taught_by = None
        work = Work(network, taught_by, size.image_size, run.batch_size)
        runs[work] += 1
        images[work] += run.epochs * size.train
    devices = {run.device for run in trainings.values()}
    rates = {work: images_per_second(work, *devices) for work in images}
    return [_Kind(w, runs[w], f"{rates[w]:.0f} images/s", images[w] / rates[w]) for w in images]


def _few_shot(plan: Plan, missing: Mapping[str, Job]) -> list[_Kind]:
    """Tests and meta-trainings; for tests it is left out that each image goes through the frozen model once."""
    number: Counter[FewShotWork] = Counter()
    tasks: Counter[FewShotWork] = Counter()
    rates: dict[FewShotWork, float] = {}
    for job in missing.values():
        if isinstance(job, Run):
            continue
        folder = job.teacher if isinstance(job, FewShotTest) else job.start
        assert folder is not None  # as in every table
        network, size = _network(plan, folder), _size_of(_training(plan, folder)).image_size
        if isinstance(job, FewShotTest):
            work = FewShotWork(job.run.method, network, job.run.n_shot, size)
            tasks[work] += job.run.n_episodes + job.trials * job.tune_tasks
            if work not in rates:
                student = None if job.student is None else _network(plan, job.student)
                rates[work] = tasks_per_second(job.run, network, student, size)
        else:
            work = FewShotWork(f"meta-training of {job.method}", network, job.n_shot, size)
            tasks[work] += job.n_episodes
            if work not in rates:
                rates[work] = meta_tasks_per_second(job, network, size)
        number[work] += 1
    return [_Kind(w, number[w], f"{1 / rates[w]:.2g} seconds a task", tasks[w] / rates[w]) for w in number]


def _left_to_embed(run: Run) -> float:
    """Say what share of the teacher's embeddings lies on no disk yet; all of it where the teacher is not trained."""
    if run.teacher is None or not (Path(run.teacher) / "DONE").exists():
        return 1.0
    cache = find_cache(run)
    return 1 - cache.shards_on_disk() / cache.contents.shards


def _network(plan: Plan, folder: str) -> str:
    """Find the architecture of the model that a job leaves in its folder."""
    student = _training(plan, folder).student
    assert student is not None  # or there would be no model
    return student


def _training(plan: Plan, folder: str) -> Run:
    """Find the training behind a model, which meta-training may have gone on from."""
    job = plan.runs[Path(folder).name]
    if isinstance(job, MetaRun):
        assert job.start is not None  # as in every table
        return _training(plan, job.start)
    assert isinstance(job, Run)  # nothing else leaves a model for others
    return job


def _size_of(run: Run) -> TaskSize:
    return _size(run.task, run.shots, run.val, run.data_root, run.image_size)


@cache
def _size(task: str, shots: int | None, val: float, data_root: str | None, image_size: int | None) -> TaskSize:
    root = Path(data_root) if data_root else None
    return task_size(task, data_root=root, shots=shots, val=val, image_size=image_size)


def _carry_out(
    plan: Plan, missing: Mapping[str, Job], jobs: int, console: Console, executor: Executor
) -> dict[str, str]:
    """Carry out the missing runs; returns why runs failed, by their names."""
    failures: dict[str, str] = {}
    count = itertools.count(1)

    def tell(name: str, found: Found) -> None:
        _say(console, f"  {next(count)}/{len(missing)} {name}: {accuracy(found):.2f} %")

    def note(name: str, error: Exception) -> None:
        # Of a failure that is no mistake of the user's, the kind says more than the words.
        failures[name] = str(error) if isinstance(error, RefilledError) else f"{type(error).__name__}: {error}"
        _say(console, f"  {next(count)}/{len(missing)} {name} failed: {failures[name]}")

    needs = {name: [other for other in plan.needs.get(name, ()) if other in missing] for name in missing}
    run_grid(missing, plan.folder, jobs, tell, note, needs, executor)
    return failures


def _entry(cell: Cell, plan: Plan, kept: Path, failures: dict[str, str]) -> Entry:
    name = plan.run_of(cell)
    found = plan.result(name)
    if name is None or found is None:
        return Entry(cell)
    interval = found.interval if isinstance(found, FewShotResult) else None
    try:
        return Entry(cell, plan.folder / name, measure(cell, plan.folder / name, kept), interval)
    except RefilledError as error:
        failures[cell.name] = str(error)
        return Entry(cell)


def _command(table: Table, choice: Choice, folder: Path) -> list[str]:
    options = {"--scale": choice.scale, "--recipe": choice.recipe, "--seeds": len(choice.seeds), "--out": folder}
    return ["refilled", "bench", table.name, *(str(part) for option in options.items() for part in option)]


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
