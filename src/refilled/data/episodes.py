"""Few-shot tasks: the images and classes of each task as a pure function of (seed, number of the task)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refilled.data.keyed import keyed_bits
from refilled.errors import TaskError
from refilled.words import count_of


class Episodes(NamedTuple):
    """T tasks of N classes, with K support and Q query images per class. Images are positions in the pool.

    In every task, classes are numbered 0 .. N - 1 and images are sorted by class. All tasks therefore share their
    labels.
    """

    numbers: Tensor
    """``(T,)``: the numbers of the tasks."""

    classes: Tensor
    """``(T, N)``: class ids of the pool."""

    support: Tensor
    """``(T, N K)``: positions of the support images."""

    query: Tensor
    """``(T, N Q)``: positions of the query images."""

    labels: Tensor
    """``(N K,)``: labels 0 .. N - 1 of the support images of every task."""

    query_labels: Tensor
    """``(N Q,)``: labels of the query images."""


def sample_episodes(
    labels: Tensor, numbers: Sequence[int], *, n_way: int = 5, n_shot: int = 1, n_query: int = 15, seed: int = 0
) -> Episodes:
    """Draw the tasks with these numbers. Each task depends only on the seed and its own number.

    Per class, query images are drawn before support images. With the same seed, tasks with fewer shots therefore have
    the same query images, and a subset of the support images.

    Args:
        labels: Class ids ``(M,)`` of the pool's images.
        numbers: Numbers of the tasks.
        n_way: Classes per task, N.
        n_shot: Support images per class, K.
        n_query: Query images per class, Q; see :func:`queries_left` for smaller classes.
        seed: Seed of the tasks.

    Raises:
        TaskError: A number is out of range, there are fewer classes than ``n_way``, or a class has too few images.
    """
    _check_ways(labels, n_way, n_shot, n_query)
    left = queries_left(labels, n_shot, n_query)
    if left < n_query:
        raise TaskError(
            f"the smallest class has {count_of(left, 'image')} left for queries after {count_of(n_shot, 'shot')}, not "
            f"{n_query}"
        )
    order = labels.argsort(stable=True).numpy()
    present, counts = np.unique(labels.numpy(), return_counts=True)
    images = np.split(order, np.cumsum(counts)[:-1])
    task = np.asarray(numbers, dtype=np.int64)
    keys = keyed_bits(seed, "classes", task[:, None], np.arange(len(present)))  # (T, C)
    chosen = keys.argsort(1, kind="stable")[:, :n_way]  # (T, N)
    drawn = np.empty((len(task), n_way, n_query + n_shot), dtype=np.int64)
    for t, way in np.ndindex(chosen.shape):
        drawn[t, way] = _draw(images[chosen[t, way]], n_query + n_shot, seed, int(task[t]))
    query, support = drawn[..., :n_query], drawn[..., n_query:]
    ways = torch.arange(n_way)
    return Episodes(
        torch.from_numpy(task),
        torch.from_numpy(present[chosen]),
        torch.from_numpy(support.reshape(len(task), -1)),
        torch.from_numpy(query.reshape(len(task), -1)),
        ways.repeat_interleave(n_shot),
        ways.repeat_interleave(n_query),
    )


def queries_left(labels: Tensor, n_shot: int, n_query: int, names: Sequence[str] = ()) -> int:
    """Return the number of query images that every class has left after its shots, at most ``n_query``.

    The number is the same for all classes, so that the accuracies of tasks can be averaged.

    Args:
        labels: Class ids ``(M,)`` of the pool's images.
        n_shot: Support images per class.
        n_query: Desired query images per class.
        names: Names of the classes, for the error.

    Raises:
        TaskError: A class has fewer than ``n_shot + 1`` images.
    """
    present, counts = torch.unique(labels, return_counts=True)
    smallest = int(counts.min())
    if smallest < n_shot + 1:
        number = int(present[counts.argmin()])
        name = names[number] if names else number
        raise TaskError(
            f"class {name} has {count_of(smallest, 'image')}, but {count_of(n_shot, 'shot')} and at least one query "
            f"image need {n_shot + 1}; use fewer shots, or remove the class from the split"
        )
    return min(n_query, smallest - n_shot)


def _draw(rows: NDArray[np.int64], count: int, seed: int, number: int) -> NDArray[np.int64]:
    keys = keyed_bits(seed, "episode", number, rows)
    return rows[keys.argsort(kind="stable")[:count]]


def _check_ways(labels: Tensor, n_way: int, n_shot: int, n_query: int) -> None:
    for name, value, least in (("n_way", n_way, 2), ("n_shot", n_shot, 1), ("n_query", n_query, 1)):
        if value < least:
            raise TaskError(f"{name} = {value} is out of range; give {least} or more")
    classes = len(labels.unique())
    if classes < n_way:
        raise TaskError(f"a task of {n_way} classes cannot be drawn from {classes} classes; use a smaller n_way")
