"""A few-shot test, from its configuration to the mean accuracy over many tasks and its interval.

The folder of a test holds ``run.toml`` (the resolved configuration), ``tasks.jsonl`` (the accuracy of each task),
``result.json``, and ``DONE`` once the test is complete. An interrupted test resumes when it is started again.
"""

import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Self

import torch
from torch import Tensor

from refilled.config import FewShotRun
from refilled.data import Side, Task, load_pool, queries_left, sample_episodes
from refilled.errors import RunError
from refilled.fewshot.bank import Bank, Known, Learner
from refilled.fewshot.methods import load_few_shot_method
from refilled.files import (
    append,
    damaged,
    read_fields,
    read_json_lines,
    read_record,
    read_tensors,
    require,
    write_atomic,
)
from refilled.models import load_teacher
from refilled.runs.determinism import use_machine
from refilled.runs.environment import device_name, find_device, versions
from refilled.runs.prepared import examine
from refilled.training.checkpoints import hold
from refilled.training.teacher_cache import fingerprint
from refilled.words import count_of

TASKS = "tasks.jsonl"
"""File with the accuracy of each task."""
HEAD = "head.safetensors"
"""File next to a model: the weights that meta-training learned in addition to it."""


@dataclass(frozen=True)
class FewShotResult:
    """The result of a finished test, as in ``result.json``."""

    accuracy: float
    """Accuracy on the query images in percent, mean over tasks."""
    interval: float | None
    """Half the width of the 95 % interval over tasks; None for a single task."""
    n_episodes: int
    n_query: int
    """Query images per class."""
    seconds: float
    """Time to embed, learn and classify, summed over all starts of the test. Loading is not included."""
    tasks_per_second: float
    seed: int
    data: dict[str, Any]
    teacher: dict[str, Any] | None
    versions: dict[str, str]
    hardware: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a finished test's result.

        Raises:
            RunError: The test is not finished, or its result is damaged.
        """
        if not (folder / "DONE").exists():
            raise RunError(f"{folder} holds no finished few-shot test")
        found = read_fields(cls, folder / "result.json")
        require(folder / "result.json", found.data, pool=str, fingerprint=str, images=int, classes=int, notes=list)
        return found


Progress = Callable[[int, float, float | None], None]
"""Called after each batch with the number of finished tasks, their mean accuracy and its interval."""


Testing = Callable[[FewShotRun, Sequence[range]], Generator[list[float], None, None]]
"""Yields the accuracies of the tasks in each range of task numbers, one batch after another."""


def evaluate_few_shot(
    run: FewShotRun,
    folder: Path,
    progress: Progress = lambda done, mean, interval: None,
    testing: Testing | None = None,
    jobs: int = 1,
) -> FewShotResult:
    """Run a test, or the rest of it, and write everything to its folder.

    Args:
        run: The test.
        folder: Its folder.
        progress: Called after each batch.
        testing: Runs the tasks. None: this process runs them.
        jobs: Number of batches that ``testing`` runs at a time.

    Raises:
        RunError: The folder holds something else, or another process holds its lock.
        RefilledError: The run cannot work as configured.
    """
    run = resolve(run)
    refuse_other(folder, run.to_toml())
    if (folder / "DONE").exists():
        return FewShotResult.load(folder)
    use_machine(run.threads, run.device)
    pool = load_side(run)
    bank = make_bank(run, pool)
    learner = load_few_shot_method(run.method).learner(bank, run.settings)
    n_query = queries_left(pool.train.labels, run.n_shot, run.n_query, pool.classes)
    filled = replace(run, n_query=n_query)
    folder.mkdir(parents=True, exist_ok=True)  # only after everything has been checked
    with hold(folder):
        write_atomic(folder / "run.toml", run.to_toml().encode())
        done = _Record(folder / TASKS)
        batches = list(_batches(range(len(done), run.n_episodes), run.batch, jobs))
        here = (task_accuracies(learner, pool.train.labels, numbers, filled) for numbers in batches)
        start = time.perf_counter()
        with closing(testing(filled, batches) if testing else here) as batches_done:
            for accuracies in batches_done:
                now = time.perf_counter()
                done.add(accuracies, (now - start) / len(accuracies))
                start = now
                progress(len(done), *mean_and_interval(done.accuracies))
        result = _result(run, pool, bank, done, n_query)
        write_atomic(folder / "result.json", (json.dumps(asdict(result), indent=2) + "\n").encode())
        write_atomic(folder / "DONE", b"")
    return result


def resolve(run: FewShotRun) -> FewShotRun:
    """Fill in what the run leaves to the machine and to the method's defaults.

    Raises:
        RefilledError: The device is not available, or the method or one of its parameters does not exist.
    """
    return replace(
        run,
        device=find_device(run.device).type,
        settings=load_few_shot_method(run.method).settle(run.settings),
        threads=run.threads or torch.get_num_threads(),
    )


def refuse_other(folder: Path, configuration: str) -> None:
    """Check that a folder is empty or holds a run of the same configuration.

    Raises:
        RunError: It holds something else.
    """
    file = folder / "run.toml"
    if file.exists() and read_record(file) != configuration:
        raise RunError(
            f"{folder} holds a run of another configuration, by its run.toml; remove it, or choose another --out"
        )
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; choose another --out")
    if not file.exists() and folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no run; choose another --out")


def load_side(run: FewShotRun, side: Side | None = None) -> Task:
    """Load the images of the run's side of the class split, or of another side."""
    root = Path(run.data_root) if run.data_root else None
    return load_pool(run.data, side or run.side, data_root=root, image_size=run.image_size, allow_bad=run.allow_bad)


def make_bank(run: FewShotRun, pool: Task) -> Bank:
    """Make a bank of the pool's images and the run's frozen model, if it names one."""
    if run.teacher is None:
        return Bank(pool.train.pixels, augmentation=pool.augmentation, device=run.device)
    name = os.path.expandvars(run.teacher)
    model = load_teacher(
        name,
        mean=run.teacher_mean,
        std=run.teacher_std,
        input_size=run.teacher_size,
        image_size=pool.image_size,
        pooling=run.teacher_embedding,
    )
    notes = examine(model, pool.train)
    head_file = Path(name) / HEAD
    return Bank(
        pool.train.pixels,
        model,
        augmentation=pool.augmentation,
        device=run.device,
        head=read_tensors(head_file) if head_file.exists() else {},
        known=_known(name, fingerprint(model), pool.fingerprint, pool.augmentation, run.device),
        sources=pool.train.sources,
        notes=notes,
    )


@lru_cache(maxsize=2)  # for the unseen and the validation classes
def _known(name: str, model: str, images: str, augmentation: str, device: str) -> Known:
    """Return one shared store of embeddings per pair of images and model in this process."""
    return {}


def batch_accuracies(run: FewShotRun, numbers: range) -> list[float]:
    """Run some tasks of a resolved test. Each process loads the images and the model once."""
    learner, labels = _ready(json.dumps(asdict(run)))
    return task_accuracies(learner, labels, numbers, run)


@lru_cache(maxsize=1)
def _ready(described: str) -> tuple[Learner, Tensor]:
    run = FewShotRun(**json.loads(described))
    use_machine(run.threads, run.device)
    pool = load_side(run)
    return load_few_shot_method(run.method).learner(make_bank(run, pool), run.settings), pool.train.labels


def task_accuracies(learner: Learner, labels: Tensor, numbers: range, run: FewShotRun) -> list[float]:
    """Return the accuracy on the query images, in percent, of each task in ``numbers``."""
    episodes = sample_episodes(labels, numbers, n_way=run.n_way, n_shot=run.n_shot, n_query=run.n_query, seed=run.seed)
    right = learner(episodes).argmax(2) == episodes.query_labels
    return (100 * right.double().mean(1)).tolist()


def mean_and_interval(accuracies: list[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95 % interval: 1.96 standard errors, as is usual in the field."""
    if len(accuracies) < 2:
        return mean(accuracies), None
    return mean(accuracies), 1.96 * stdev(accuracies) / len(accuracies) ** 0.5


def recorded_accuracies(folder: Path) -> list[float]:
    """Read the accuracy of each task of a finished test.

    With the same seed, all methods see the same tasks in the same order.
    """
    entries = read_json_lines(folder / TASKS)
    for entry in entries:
        require(folder / TASKS, entry, accuracy=(int, float))
    return [entry["accuracy"] for entry in entries]


class _Record:
    """The accuracies so far, one line per task in a file. A line torn by a crash is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.accuracies: list[float] = []
        self.seconds = 0.0
        path.touch()
        whole = path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                accuracy, seconds = float(entry["accuracy"]), float(entry["seconds"])
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(damaged(path, f"line {number} is not the accuracy of a task")) from error
            self.accuracies.append(accuracy)
            self.seconds += seconds
        os.truncate(path, len(whole))

    def __len__(self) -> int:
        return len(self.accuracies)

    def add(self, accuracies: list[float], seconds: float) -> None:
        first = len(self.accuracies)
        entries = [
            {"task": task, "accuracy": accuracy, "seconds": seconds} for task, accuracy in enumerate(accuracies, first)
        ]
        append(self.path, "".join(json.dumps(entry) + "\n" for entry in entries))
        self.accuracies += accuracies
        self.seconds += seconds * len(accuracies)


def _batches(numbers: range, size: int, jobs: int) -> Iterator[range]:
    if jobs > 1:  # small batches keep all processes busy until the end
        size = min(size, max(1, len(numbers) // (4 * jobs)))
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _result(run: FewShotRun, pool: Task, bank: Bank, done: _Record, n_query: int) -> FewShotResult:
    accuracy, interval = mean_and_interval(done.accuracies)
    per_class = f"{count_of(n_query, 'query image')} per class"
    fewer = [] if n_query == run.n_query else [f"{per_class}: the smallest class has no more"]
    return FewShotResult(
        accuracy=accuracy,
        interval=interval,
        n_episodes=len(done),
        n_query=n_query,
        seconds=done.seconds,
        tasks_per_second=len(done) / done.seconds,
        seed=run.seed,
        data={
            "pool": pool.name,
            "fingerprint": pool.fingerprint,
            "images": len(pool.train),
            "classes": len(pool.classes),
            "image_size": pool.image_size,
            "skipped": [list(pair) for pair in pool.skipped],
            "notes": [*bank.notes, *fewer],
        },
        teacher={"name": run.teacher, "fingerprint": fingerprint(bank.model)} if bank.has_model else None,
        versions=versions(),
        hardware={"device": device_name(torch.device(run.device)), "threads": run.threads},
    )
