"""How long runs will take: a few steps of the training loop are timed on made-up images before anything starts."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from refilled.checkpoints import State
from refilled.data import Split, Task
from refilled.experiment import resolve
from refilled.methods.refilled import refilled
from refilled.methods.vanilla import vanilla
from refilled.models import Backbone, create_model
from refilled.models.backbone import freeze
from refilled.run import Run
from refilled.stages import Stage
from refilled.training import Position, fit

_STEPS = 2  # timed, after one that warms up
_CLASSES = 10
_ENOUGH_ON_A_CPU = 32  # images a step; the time of more is in proportion there, but not on an accelerator


@dataclass(frozen=True)
class Work:
    """What the time of a step depends on most."""

    student: str
    teacher: str | None
    """Its architecture; None for a student alone."""
    image_size: int
    batch_size: int

    def __str__(self) -> str:
        taught = f" taught by {self.teacher}" if self.teacher else " alone"
        return f"{self.student}{taught}, {self.image_size} px"


def images_per_second(work: Work, device: str = "auto") -> float:
    """Time the training loop on made-up images, on one thread of a processor or on an accelerator.

    With a teacher, the loss has the terms of one-stage ReFilled, which stand for those of any method.
    """
    run = resolve(Run(task="made up", student=work.student, device=device, warmup=0.0, epochs=1))
    batch = min(work.batch_size, _ENOUGH_ON_A_CPU) if run.device == "cpu" else work.batch_size
    task = _made_up_task(batch * (1 + _STEPS), work.image_size)
    student = _model(work.student, task)
    teacher = None if work.teacher is None else freeze(_model(work.teacher, task))
    stages = vanilla(student, None) if teacher is None else refilled(student, teacher, gamma=0.1)
    fabric = Fabric(accelerator=run.device, devices=1, precision=run.precision)  # type: ignore[arg-type]
    clock = _Clock()
    with _one_thread():
        fit(student, teacher, task, stages, Run(**{**vars(run), "batch_size": batch}), fabric, clock)
    return batch * _STEPS / (clock.ticks[-1] - clock.ticks[0])


def _made_up_task(images: int, size: int) -> Task:
    pixels = torch.randint(256, (images, 3, size, size), dtype=torch.uint8).to(memory_format=torch.channels_last)
    train = Split(pixels, torch.arange(images) % _CLASSES, ("",) * images)
    nothing = Split(pixels[:0], train.labels[:0], ())
    classes = tuple(map(str, range(_CLASSES)))
    return Task("made up", classes, train, nothing, nothing, size, "crop-flip", fingerprint="")


def _model(name: str, task: Task) -> Backbone:
    return create_model(name, len(task.classes), image_size=task.image_size)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Clock:
    """A :class:`~refilled.training.Journal` that keeps nothing but the time after each step."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def step(self, position: Position, images: int, values: Mapping[str, Tensor]) -> None:
        for value in values.values():
            value.item()  # an accelerator is done with the step only now
        self.ticks.append(time.perf_counter())

    def restore(self) -> State | None:
        return None

    def checkpoint_due(self) -> bool:
        return False

    def save(self, state: State) -> None: ...

    def begin_stage(self, stage: Stage, epochs: int, steps: int, done: int) -> None: ...

    def epoch(self, entry: Mapping[str, Any]) -> None: ...

    def end_stage(self, stage: Stage, student: Backbone) -> None: ...
