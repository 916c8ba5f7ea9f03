"""How fast runs will be: a few steps of the training loop are timed on made-up images before anything starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric

from refilled.cost import probe_batches, step_cost
from refilled.data import TaskSize
from refilled.experiment import resolve
from refilled.methods.refilled import refilled
from refilled.methods.vanilla import vanilla
from refilled.models import create_model
from refilled.models.backbone import freeze
from refilled.run import Run

_CLASSES = tuple(map(str, range(10)))


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
    run = resolve(Run(task="made up", student=work.student, device=device, batch_size=work.batch_size))
    size = TaskSize(_CLASSES, 0, 0, 0, work.image_size, "crop-flip", images_per_second=0.0)
    student = create_model(work.student, len(_CLASSES), image_size=work.image_size)
    teacher = None
    if work.teacher is not None:
        teacher = freeze(create_model(work.teacher, len(_CLASSES), image_size=work.image_size))
    (stage,) = vanilla(student, None) if teacher is None else refilled(student, teacher, gamma=0.1)
    fabric = Fabric(accelerator=run.device, devices=1, precision=run.precision)  # type: ignore[arg-type]
    with _one_thread():
        cost = step_cost(student, teacher, stage, size, run, fabric, probe_batches(run.device, work.batch_size))
    return work.batch_size / cost.seconds(work.batch_size)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
