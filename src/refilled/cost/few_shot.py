"""Estimates of the time of few-shot tests and meta-training, from tasks of random images timed before any work starts.

The images carry no information and the networks are not trained. This does not change the cost of a task, except for
classifiers that iterate until convergence, which are fast in any case.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from refilled.config import FewShotRun, MetaRun
from refilled.cost.speed import one_thread
from refilled.cost.step import made_up_task
from refilled.data import TaskSize, sample_episodes
from refilled.fewshot.bank import Bank, Known
from refilled.fewshot.evaluation import resolve, task_accuracies
from refilled.fewshot.meta_learner import MetaLearner, MetaTask
from refilled.fewshot.methods import list_meta_learners, load_few_shot_method, load_meta_learner
from refilled.models import Backbone, create_model
from refilled.models.backbone import freeze
from refilled.runs.environment import find_device

_SOON, _LONG = 0.1, 1.0  # seconds; shorter tasks are timed in a batch, longer ones are not repeated for warm-up
_FEW_STEPS = 5


@dataclass(frozen=True)
class FewShotWork:
    """The properties that the time of a few-shot task depends on."""

    method: str
    network: str
    """Architecture of the frozen or the meta-trained model."""
    shots: int
    image_size: int

    def __str__(self) -> str:
        return f"{self.method} on {self.network}, {self.shots} {'shot' if self.shots == 1 else 'shots'}"


def tasks_per_second(run: FewShotRun, network: str, student: str | None, image_size: int) -> float:
    """Return the measured tasks per second of a test, given the embeddings of the frozen model.

    Args:
        run: The test.
        network: Architecture of the frozen model.
        student: Architecture of the network that is trained per task; None if the method trains none.
        image_size: Side length of the images.
    """
    start = {} if student is None else {"student": student}
    run = resolve(replace(run, settings={**run.settings, **start}))
    steps: int = run.settings.get("steps", 0)
    if steps > _FEW_STEPS:  # all steps cost the same
        one, few = (_seconds_per_task(_with_steps(run, number), network, image_size) for number in (1, _FEW_STEPS))
        return 1 / (one + (steps - 1) * max(0.0, few - one) / (_FEW_STEPS - 1))
    return 1 / _seconds_per_task(run, network, image_size)


def _with_steps(run: FewShotRun, steps: int) -> FewShotRun:
    return replace(run, settings={**run.settings, "steps": steps})


def _seconds_per_task(run: FewShotRun, network: str, image_size: int) -> float:
    size = TaskSize(tuple(map(str, range(run.n_way))), 0, 0, 0, image_size, "crop-flip", images_per_second=0.0)
    pool = made_up_task(size, run.n_way * (run.n_shot + run.n_query))
    pixels, labels = pool.train.pixels, pool.train.labels
    model = create_model(network, run.n_way, image_size=image_size)
    head = {}
    if run.method in list_meta_learners():
        head = _meta_learner(run.method, model).head()
    everything = torch.ones(len(pixels), dtype=torch.bool)
    known: Known = {
        view: (torch.randn(len(pixels), model.embedding_dim), everything)
        for view in (None, *range(run.settings.get("views", 0)))
    }
    bank = Bank(pixels, freeze(model), augmentation=pool.augmentation, device=run.device, head=head, known=known)
    learner = load_few_shot_method(run.method).learner(bank, run.settings)
    return _seconds(lambda tasks: task_accuracies(learner, labels, range(tasks), run), run.batch)


def meta_tasks_per_second(run: MetaRun, network: str, image_size: int) -> float:
    """Return the measured tasks per second of meta-training of this architecture, with validation included."""
    backbone = create_model(network, run.n_way, image_size=image_size)
    learner, device = _meta_learner(run.method, backbone, **run.settings), find_device(run.device)
    learner.to(device).to(memory_format=torch.channels_last)
    labels = torch.arange(run.n_way).repeat_interleave(run.n_shot + run.n_query)
    drawn = sample_episodes(labels, range(1), n_way=run.n_way, n_shot=run.n_shot, n_query=run.n_query)

    def images(rows: Tensor) -> Tensor:
        return torch.randint(256, (*rows.shape, 3, image_size, image_size), dtype=torch.uint8, device=device)

    of_support, of_query = drawn.labels.to(device), drawn.query_labels.to(device)
    task = MetaTask(images(drawn.support), of_support, images(drawn.query), of_query)

    def steps(tasks: int) -> None:
        for _ in range(tasks):
            learner.loss(task)[0].backward()

    def validations(tasks: int) -> None:
        with torch.no_grad():
            for _ in range(tasks):
                learner.scores(task)

    return 1 / (_seconds(steps, 1) + run.n_validation / run.validate_every * _seconds(validations, 1))


def _meta_learner(method: str, backbone: Backbone, **settings: Any) -> MetaLearner:
    learner = load_meta_learner(method).function(backbone, **settings)
    assert isinstance(learner, MetaLearner)
    return learner


def _seconds(work: Callable[[int], object], together: int) -> float:
    """Return the seconds per task, from a batch of ``together`` tasks if a single one is short."""
    with one_thread():
        taken = _time(work, 1)
        if taken < _LONG:
            taken = _time(work, 1)
        return taken if taken > _SOON else _time(work, together) / together


def _time(work: Callable[[int], object], tasks: int) -> float:
    start = perf_counter()
    work(tasks)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return perf_counter() - start
