"""A sample of a task's training images, and a teacher's embedding of it."""

from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from refilled.config import Run
from refilled.data import Split, Task, Views
from refilled.data.task import fingerprint
from refilled.errors import TaskError
from refilled.files import cache_folder
from refilled.models import Backbone, multiplications_of
from refilled.runs.prepared import runs_code
from refilled.runs.scoring import finite_embedding
from refilled.runs.teacher_caches import embedder, fabric_of
from refilled.training.teacher_cache import teacher_cache

SAMPLE = 2000
"""Default number of images in a sample."""

_TIMED = 8  # images at a time
_TIMES = 3


@dataclass(frozen=True)
class Cost:
    """The cost of embedding one image.

    Attributes:
        size: Side length in pixels of the teacher's input.
        multiplications: Number of multiply-accumulate operations; None if they cannot be counted.
        milliseconds: Time in ms on this machine, in batches of 8.
    """

    size: int
    multiplications: int | None
    milliseconds: float


def sample_of(task: Task, images: int = SAMPLE, seed: int = 0) -> Task:
    """Return the task with a sample of its training images, spread evenly over its classes.

    Each class keeps two images or more. If the sample is too small for that, classes are left out.

    Args:
        task: The task.
        images: Maximum number of images of the sample.
        seed: Seed of the choice.

    Raises:
        TaskError: There are fewer than two classes with two images each.
    """
    labels = task.train.labels.numpy()
    classes, counts = np.unique(labels, return_counts=True)
    classes = classes[counts > 1]
    if len(classes) < 2:
        raise TaskError(
            f"{task.name} has too few training images to compare teachers: at least two classes need two images each"
        )
    if len(classes) > max(2, images // 2):
        classes = classes[np.linspace(0, len(classes) - 1, max(2, images // 2)).round().astype(int)]
    chance = np.random.default_rng(seed).random(len(labels))
    rank = np.full(len(labels), len(labels))
    for number in classes:
        rows = (labels == number).nonzero()[0]
        rank[rows[chance[rows].argsort()]] = np.arange(len(rows))
    order = np.lexsort((labels, rank))
    order = order[rank[order] < len(labels)]
    rows = np.sort(order[: max(images, 2 * len(classes))])
    chosen = torch.from_numpy(rows)
    known = None if task.train.known_digests is None else task.train.known_digests[rows]
    sources = [task.train.sources[row] for row in rows.tolist()]
    train = Split(task.train.pixels[chosen], task.train.labels[chosen], sources, known)
    digest = fingerprint(task.classes, (train,))
    return replace(task, train=train, fingerprint=digest, unlabelled=None, unlabelled_fingerprint=None)


def embedding_of(teacher: Backbone, sample: Task, run: Run) -> Tensor:
    """Return the teacher's embedding of the sample's training images ``(N, d)``, from the cache if possible.

    The embedding of a teacher from a Python file is not cached, because its code may change with equal weights.

    Args:
        teacher: The teacher.
        sample: See :func:`sample_of`.
        run: The resolved run, which gives the device, the precision and the name of the teacher.

    Raises:
        ModelError: An embedding is NaN or infinite.
    """
    if runs_code(run.teacher):
        return finite_embedding(teacher, sample.train, run.device)
    cache = teacher_cache(
        cache_folder() / "teacher",
        teacher,
        sample,
        number=1,
        views=Views("none"),
        precision=run.precision,
        names=(run.only_teacher or "", f"{sample.name}, a sample of {len(sample.train)} images"),
    )
    cache.build(sample, embedder(teacher, fabric_of(run)))
    return cache(0, torch.arange(len(sample.train)))


def cost_of(teacher: Backbone, sample: Task, device: torch.device | str) -> Cost:
    """Measure the cost of embedding one image."""
    teacher.to(device)
    images = sample.train.pixels[torch.arange(min(_TIMED, len(sample.train)))].to(device)
    multiplications = multiplications_of(teacher, images[:1])
    with torch.no_grad():
        taken = []
        for _ in range(_TIMES):
            start = perf_counter()
            teacher(images).embedding.cpu()  # waits for an accelerator
            taken.append(perf_counter() - start)
    size = teacher.input_size or sample.image_size
    return Cost(size, multiplications, 1000 * median(taken) / len(images))
