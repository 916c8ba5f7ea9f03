"""Estimates of the speed of runs, from a few steps of the training loop timed on random images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from lightning_fabric import Fabric

from refilled.config import Run
from refilled.cost.step import Probe, probe_batches, scoring_cost
from refilled.data import TaskSize
from refilled.methods import load_method
from refilled.methods.refilled import refilled
from refilled.methods.vanilla import vanilla
from refilled.models import create_model
from refilled.models.backbone import freeze
from refilled.runs.prepared import resolve

_CLASSES = tuple(map(str, range(10)))


@dataclass(frozen=True)
class Work:
    """The properties that the time of a step depends on most."""

    student: str
    teacher: str | None
    """Architecture of the teacher; None if there is no teacher, or if its embeddings are on disk."""
    image_size: int
    batch_size: int
    trains: bool = True
    """Whether the student is trained. Otherwise it is a teacher that embeds images for the cache."""

    def __str__(self) -> str:
        taught = f" taught by {self.teacher}" if self.teacher else " alone"
        return f"{self.student}{taught if self.trains else ' embedding'}, {self.image_size} px"


def keeps_embeddings(run: Run, student: str, teacher: str) -> bool:
    """Return whether cached embeddings on disk replace the teacher in this run."""
    return run.views is not None and not _reads_maps(run.method, tuple(run.settings.items()), student, teacher)


@cache
def _reads_maps(method: str, settings: tuple[tuple[str, Any], ...], student: str, teacher: str) -> bool:
    learner, master = (create_model(network, len(_CLASSES), image_size=32) for network in (student, teacher))
    learner.class_names = master.class_names = _CLASSES
    plan = load_method(method).build(learner, master, dict(settings))
    return isinstance(plan, Sequence) and any(stage.needs_teacher and not stage.embedding_suffices for stage in plan)


def images_per_second(work: Work, device: str = "auto") -> float:
    """Return the images per second of the training loop on random images, on one CPU thread or on an accelerator.

    With a teacher, the loss has the terms of one-stage ReFilled, which represent those of any method.
    """
    run = resolve(Run(task="made up", student=work.student, device=device, batch_size=work.batch_size))
    fabric = Fabric(accelerator=run.device, devices=1, precision=run.precision)  # type: ignore[arg-type]
    size = TaskSize(_CLASSES, 0, 0, 0, work.image_size, "crop-flip", images_per_second=0.0)
    student = create_model(work.student, len(_CLASSES), image_size=work.image_size)
    teacher = None
    if work.teacher is not None:
        teacher = freeze(create_model(work.teacher, len(_CLASSES), image_size=work.image_size))
    (stage,) = vanilla(student, None) if teacher is None else refilled(student, teacher, gamma=0.1)
    with one_thread():
        if not work.trains:
            return work.batch_size / scoring_cost(freeze(student), size, run, fabric).seconds(work.batch_size)
        probe = Probe(student, teacher, stage, size, run, fabric)
        cost = probe.step_cost(probe_batches(run.device, work.batch_size))
    return work.batch_size / cost.seconds(work.batch_size)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread within this block, as the jobs of a table do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
