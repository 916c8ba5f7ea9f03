"""The batches of an epoch, as a pure function of (seed, epoch)."""

from collections.abc import Callable
from itertools import chain, islice
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refilled.data.keyed import keyed_bits, keyed_permutation
from refilled.errors import TaskError, unknown

Sampler = Literal["shuffle", "balanced"]


def spread(length: int, count: int) -> Tensor:
    """Return at most ``count`` of the indices 0 .. length - 1, int64, evenly spaced."""
    return torch.linspace(0, length - 1, min(count, length), dtype=torch.float64).round().long()


def epoch_batches(
    labels: Tensor,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    sampler: Sampler = "shuffle",
    images_per_class: int = 4,
) -> list[Tensor]:
    """Return the batches of one epoch: int64 index tensors, ``ceil(N / batch_size)`` of them.

    ``"shuffle"`` splits a random permutation. Every image occurs exactly once. The sizes of batches differ by at most
    one, since a small last batch would distort batch statistics.

    ``"balanced"`` draws ``images_per_class`` images of each of ``batch_size // images_per_class`` different classes.
    Every image then has positives, and a class centre is the mean of several images. The numbers of times that two
    classes are drawn in an epoch differ by at most one. Each class cycles through its images in random order, so that
    small classes repeat images. If a batch has room for more classes than there are, each gives more images.

    Args:
        labels: Class ids ``(N,)``.
        batch_size: Largest number of images in a batch.
        seed: The run's seed.
        epoch: The epoch, from 0.
        sampler: ``"shuffle"`` or ``"balanced"``.
        images_per_class: K of the balanced sampler.

    Raises:
        TaskError: The sampler is unknown, or a batch has no room for ``images_per_class`` images.
    """
    if sampler not in get_args(Sampler):
        raise TaskError(unknown("sampler", str(sampler), get_args(Sampler)))
    if batch_size < 1:
        raise TaskError(f"a batch needs at least one image, but batch_size is {batch_size}")
    if len(labels) == 0:
        return []
    steps = -(-len(labels) // batch_size)
    if sampler == "shuffle":
        order = keyed_permutation(len(labels), seed, "shuffle", epoch)
        return [torch.from_numpy(batch) for batch in np.array_split(order, steps)]
    if not 1 <= images_per_class <= batch_size:
        raise TaskError(
            f"images_per_class={images_per_class} must be between 1 and batch_size={batch_size}; "
            "lower images_per_class or raise batch_size"
        )
    batches = _balanced(labels.cpu().numpy(), steps, batch_size, images_per_class, seed, epoch)
    return list(torch.from_numpy(batches))


def joined_batches(
    labels: Tensor,
    unlabelled: int,
    *,
    batch: tuple[int, int],
    steps: int,
    seed: int,
    epoch: int,
    sampler: Sampler = "shuffle",
    images_per_class: int = 4,
) -> list[Tensor]:
    """Return the batches of one epoch over labelled and unlabelled images, the labelled ones first in each batch.

    Each kind is sampled as by :func:`epoch_batches`, the unlabelled images always with ``"shuffle"``, and sampled
    again until there are ``steps`` batches. No image occurs twice in a batch, unless the balanced sampler repeats it.

    Args:
        labels: Class ids ``(N,)`` of the labelled images, whose indices are 0 .. N - 1.
        unlabelled: Number M of unlabelled images, whose indices are N .. N + M - 1. 0: labelled images only.
        batch: Largest number of labelled and of unlabelled images in a batch.
        steps: Number of batches.
        seed: The run's seed.
        epoch: The epoch, from 0.
        sampler: Sampler of the labelled images.
        images_per_class: K of the balanced sampler.

    Raises:
        TaskError: As :func:`epoch_batches`.
    """

    def labelled_lap(lap: int) -> list[Tensor]:
        return epoch_batches(
            labels,
            batch_size=batch[0],
            seed=seed,
            epoch=lap,
            sampler=sampler,
            images_per_class=images_per_class,
        )

    def unlabelled_lap(lap: int) -> list[Tensor]:
        batches = epoch_batches(labels.new_empty(unlabelled), batch_size=batch[1], seed=seed, epoch=lap)
        return [len(labels) + indices for indices in batches]

    if not unlabelled:
        return _repeated(labelled_lap, epoch, steps)
    pairs = zip(_repeated(labelled_lap, epoch, steps), _repeated(unlabelled_lap, epoch, steps), strict=True)
    return [torch.cat(pair) for pair in pairs]


def _repeated(lap: Callable[[int], list[Tensor]], epoch: int, steps: int) -> list[Tensor]:
    """Return the first ``steps`` batches of the laps that belong to an epoch."""
    first = lap(0)
    laps = -(-steps // len(first))
    passes = (lap(number) for number in range(epoch * laps, (epoch + 1) * laps))
    return list(islice(chain.from_iterable(passes), steps))


def _balanced(
    labels: NDArray[np.int64], steps: int, batch_size: int, images_per_class: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Return indices ``(steps, P K)``, with K images of each of P classes in every row."""
    _, labels, counts = np.unique(labels, return_inverse=True, return_counts=True)
    classes_per_batch = min(batch_size // images_per_class, len(counts))
    images_per_class = batch_size // classes_per_batch
    # Each class's images in random order, class after class.
    images = np.lexsort((keyed_bits(seed, "images", epoch, np.arange(len(labels))), labels))
    starts = np.cumsum(counts) - counts
    turns = np.zeros_like(counts)
    batches = np.empty((steps, classes_per_batch * images_per_class), dtype=np.int64)
    for step, classes in enumerate(_class_turns(len(counts), steps, classes_per_batch, seed, epoch)):
        nth = turns[classes, None] * images_per_class + np.arange(images_per_class)  # (P, K)
        batches[step] = images[starts[classes, None] + nth % counts[classes, None]].ravel()
        turns[classes] += 1
    return batches


def _class_turns(classes: int, steps: int, per_batch: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return class ids ``(steps, per_batch)``: no class twice in a row, and all equally often up to one."""
    turns = np.empty(0, dtype=np.int64)
    lap = 0
    while len(turns) < steps * per_batch:
        order = keyed_permutation(classes, seed, "classes", epoch, lap)
        # A batch may begin in one lap and end in the next. Its classes so far move to the end of the next lap.
        begun = turns[len(turns) - len(turns) % per_batch :]
        turns = np.concatenate([turns, order[np.argsort(np.isin(order, begun), kind="stable")]])
        lap += 1
    return turns[: steps * per_batch].reshape(steps, per_batch)
