"""Estimates of the time of a grid of runs, from a few timed steps of each kind of work."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from refilled.config import MetaRun, Run
from refilled.cost.few_shot import FewShotWork, meta_tasks_per_second, tasks_per_second
from refilled.cost.speed import Work, images_per_second, keeps_embeddings
from refilled.data import TaskSize, task_size
from refilled.grid.jobs import FewShotTest, Job
from refilled.runs.teacher_caches import find_cache
from refilled.training.progress import duration
from refilled.words import count_of

_SHORT = 3  # seconds; shorter work is not listed individually


class Grid(Protocol):
    """Jobs by name, and the jobs that each of them needs."""

    @property
    def runs(self) -> Mapping[str, Job]:
        """All jobs."""

    @property
    def needs(self) -> Mapping[str, Sequence[str]]:
        """Names of the jobs that must finish before a job can start."""


def estimate(grid: Grid, missing: Mapping[str, Job], jobs: int) -> list[str]:
    """Return lines with the estimated time of the missing runs on this machine, from a few steps of each kind.

    Raises:
        TaskError: The images of a run are missing or damaged.
    """
    if not missing:
        return ["nothing is left to do"]
    kinds = [*_trainings(grid, missing), *_few_shot(grid, missing)]
    total = duration(sum(kind.seconds for kind in kinds) / jobs)
    first = f"{count_of(len(missing), 'run')} to do, about {total} in {count_of(jobs, 'process')}:"
    long = [kind for kind in kinds if kind.seconds >= _SHORT * kind.number]
    others = sum(kind.number for kind in kinds if kind not in long)
    return [first, *map(str, long), *([f"  {others} of a few seconds each"] if others else [])]


@dataclass(frozen=True)
class _Kind:
    """The remaining work of one kind."""

    what: Work | FewShotWork
    number: int
    speed: str
    seconds: float
    """Seconds of all of it in sequence."""

    def __str__(self) -> str:
        return f"  {self.number} x {self.what}: {self.speed}, {duration(self.seconds / self.number)} each"


def _trainings(grid: Grid, missing: Mapping[str, Job]) -> list[_Kind]:
    runs: Counter[Work] = Counter()
    images: Counter[Work] = Counter()
    trainings = {name: job for name, job in missing.items() if isinstance(job, Run)}
    kept = set()  # teachers' embeddings, computed once for all runs
    for name, run in trainings.items():
        size = _size_of(run)
        named = run.only_teacher
        teacher = None if named is None else _network(grid, named)
        # A method without a student trains the teacher's network or nothing, which costs no more.
        network, taught_by = (run.student, teacher) if run.student else (teacher, None)
        assert network is not None  # every run has one of the two
        if taught_by is not None and keeps_embeddings(run, network, taught_by):
            views = (grid.needs[name], run.task, run.shots and (run.shots, run.seed), run.views)
            left = 0.0 if views in kept else left_to_embed(run)
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


def _few_shot(grid: Grid, missing: Mapping[str, Job]) -> list[_Kind]:
    """Return tests and meta-trainings; the single embedding of each image by the frozen model is not counted."""
    number: Counter[FewShotWork] = Counter()
    tasks: Counter[FewShotWork] = Counter()
    rates: dict[FewShotWork, float] = {}
    for job in missing.values():
        if isinstance(job, Run):
            continue
        folder = job.teacher if isinstance(job, FewShotTest) else job.start
        assert folder is not None  # as in every table
        network, size = _network(grid, folder), _size_of(_training(grid, folder)).image_size
        if isinstance(job, FewShotTest):
            work = FewShotWork(job.run.method, network, job.run.n_shot, size)
            tasks[work] += job.run.n_episodes + job.trials * job.tune_tasks
            if work not in rates:
                student = None if job.student is None else _network(grid, job.student)
                rates[work] = tasks_per_second(job.run, network, student, size)
        else:
            work = FewShotWork(f"meta-training of {job.method}", network, job.n_shot, size)
            tasks[work] += job.n_episodes
            if work not in rates:
                rates[work] = meta_tasks_per_second(job, network, size)
        number[work] += 1
    return [_Kind(w, number[w], f"{1 / rates[w]:.2g} seconds per task", tasks[w] / rates[w]) for w in number]


def left_to_embed(run: Run) -> float:
    """Return the share of the teacher's embeddings that is not yet on disk; 1 if the teacher is not trained yet."""
    teacher = run.only_teacher
    if teacher is None or not (Path(teacher) / "DONE").exists():
        return 1.0
    cache = find_cache(run)
    return 1 - cache.shards_on_disk() / cache.contents.shards


def _network(grid: Grid, folder: str) -> str:
    """Return the architecture of the model that a job writes to its folder."""
    student = _training(grid, folder).student
    assert student is not None  # otherwise there would be no model
    return student


def _training(grid: Grid, folder: str) -> Run:
    """Return the training of a model, which may be the start of a meta-training."""
    job = grid.runs[Path(folder).name]
    if isinstance(job, MetaRun):
        assert job.start is not None  # as in every table
        return _training(grid, job.start)
    assert isinstance(job, Run)  # no other job writes a model
    return job


def _size_of(run: Run) -> TaskSize:
    return _size(run.task, run.shots, run.val, run.data_root, run.image_size)


@cache
def _size(task: str, shots: int | None, val: float, data_root: str | None, image_size: int | None) -> TaskSize:
    root = Path(data_root) if data_root else None
    return task_size(task, data_root=root, shots=shots, val=val, image_size=image_size)
