"""Which images make up each batch of an epoch, as a pure function of (seed, epoch)."""

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

    ``"shuffle"`` deals out a random permutation. Every image comes exactly once and no batch is more than one image
    smaller than another, so that there is no small last batch to disturb batch statistics.

    ``"balanced"`` draws ``images_per_class`` images of each of ``batch_size // images_per_class`` different classes,
    so that every image has positives, and class centres are more than the image itself. Classes take turns: over the
    epoch no class is drawn more than once more often than another. A class goes through its images in random order and
    from the start again, so one with fewer images repeats them. With fewer classes than a batch has room
    for, each gives more images.

    Args:
        labels: Class ids ``(N,)``.
        batch_size: Images in a batch, at most.
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

    Each kind is dealt out as :func:`epoch_batches` does it, the unlabelled ones always by ``"shuffle"``, and anew as
    often as ``steps`` need. No image comes twice in a batch, unless the balanced sampler repeats it.

    Args:
        labels: Class ids ``(N,)`` of the labelled images, whose indices are 0 .. N - 1.
        unlabelled: Number M of unlabelled images, whose indices are N .. N + M - 1; 0 for labelled batches.
        batch: Number of labelled and of unlabelled images in a batch, at most.
        steps: Number of batches.
        seed: The run's seed.
        epoch: The epoch, from 0.
        sampler: How labelled images are dealt out.
        images_per_class: K of the balanced sampler.

    Raises:
        TaskError: As :func:`epoch_batches`.
    """

    def known(lap: int) -> list[Tensor]:
        return epoch_batches(
            labels,
            batch_size=batch[0],
            seed=seed,
            epoch=lap,
            sampler=sampler,
            images_per_class=images_per_class,
        )

    def others(lap: int) -> list[Tensor]:
        dealt = epoch_batches(labels.new_empty(unlabelled), batch_size=batch[1], seed=seed, epoch=lap)
        return [len(labels) + indices for indices in dealt]

    if not unlabelled:
        return _repeated(known, epoch, steps)
    pairs = zip(_repeated(known, epoch, steps), _repeated(others, epoch, steps), strict=True)
    return [torch.cat(pair) for pair in pairs]


def _repeated(lap: Callable[[int], list[Tensor]], epoch: int, steps: int) -> list[Tensor]:
    """Return the first ``steps`` batches of the laps that belong to an epoch."""
    first = lap(0)
    laps = -(-steps // len(first))
    found = (lap(number) for number in range(epoch * laps, (epoch + 1) * laps))
    return list(islice(chain.from_iterable(found), steps))


def _balanced(
    labels: NDArray[np.int64], steps: int, batch_size: int, images_per_class: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Return ``(steps, P K)`` indices, K images of each of P classes in every row."""
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
    """Return ``(steps, per_batch)`` class ids: no class twice in a row, all equally often up to one."""
    turns = np.empty(0, dtype=np.int64)
    lap = 0
    while len(turns) < steps * per_batch:
        order = keyed_permutation(classes, seed, "classes", epoch, lap)
        # A batch may begin in one lap and end in the next: its classes so far go to the back of the next lap.
        begun = turns[len(turns) - len(turns) % per_batch :]
        turns = np.concatenate([turns, order[np.argsort(np.isin(order, begun), kind="stable")]])
        lap += 1
    return turns[: steps * per_batch].reshape(steps, per_batch)
