"""Which images to compare: semi-hard triplets, mined from a batch.

An image is an **anchor**; another image of its class is a **positive**; an image of another class is an
**impostor** (the triplet's negative). A triplet is **semi-hard** where the impostor is farther from the anchor than
the positive is (Schroff et al., FaceNet, CVPR 2015). Mining needs no gradients and returns indices, so that any loss
can use it.

No ``(N, N, N)`` mask is ever made. Anchors are taken a block at a time, with only the positives that they have, so
the work is N² numbers for each of the ``N / C`` positives of an anchor, in pieces that fit a processor's cache.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refilled.distances import root, unit_rows
from refilled.errors import MethodError

CACHE = 2**18  # numbers of a block's temporary, 1 MiB in float32: measured best in benchmarks/mining.py
STRIPES = 32  # see nearest_farther
SORT_FROM = 128  # positives of an anchor from which sorting a row costs less than passing over it for each


class Triplets(NamedTuple):
    """T triplets as row numbers of the batch, in no particular order."""

    anchor: Tensor
    """``(T,)``."""

    positive: Tensor
    """``(T,)``: another image of the anchor's class."""

    negative: Tensor
    """``(T,)``: an image of another class, farther from the anchor than the positive."""


class Block(NamedTuple):
    """R anchors with all images of their classes, padded to the largest of these classes."""

    members: Tensor
    """``(R, P + 1)``: the anchor, then its P positives; padding repeats members."""

    real: Tensor
    """``(R, P)``: which positives are no padding."""

    @property
    def anchor(self) -> Tensor:
        """``(R,)``."""
        return self.members[:, 0]

    @property
    def positive(self) -> Tensor:
        """``(R, P)``."""
        return self.members[:, 1:]


def semi_hard_triplets(embeddings: Tensor, labels: Tensor) -> Triplets:
    """For each anchor and each other image of its class, the nearest impostor farther away than that image.

    The rule of ReFilled's stage 1 (Ye, Lu and Zhan, CVPR 2020, section 4.1). A pair without such an impostor gives no
    triplet, so there are at most as many triplets as ordered pairs of one class.

    Args:
        embeddings: ``(N, d)``; brought to length 1 before distances are taken.
        labels: Class ids ``(N,)``, any integers.

    Raises:
        MethodError: There is not one label for each embedding.

    >>> at = torch.tensor([0.0, 0.3, 0.5, 1.0])
    >>> semi_hard_triplets(torch.stack([at.cos(), at.sin()], 1), torch.tensor([7, 7, 2, 2]))._asdict()
    {'anchor': tensor([0, 1, 3]), 'positive': tensor([1, 0, 2]), 'negative': tensor([2, 3, 1])}
    """
    check_batch(labels, embeddings)
    with torch.no_grad():
        x = unit_rows(embeddings)
        mined = []
        for block in blocks(labels):
            squared = squared_from(x, block.anchor)
            reach = squared.gather(1, block.positive)
            impostor, found = nearest_farther(squared.scatter_(1, block.members, torch.inf), reach)
            mined.append(_triplets(block, impostor, found & block.real))
    return _joined(mined, labels)


def all_semi_hard_triplets(embeddings: Tensor, labels: Tensor, *, margin: float = 0.2) -> Triplets:
    """For each anchor and each other image of its class, **all** impostors farther away by up to ``margin``.

    There may be of the order of N³/C of them; the tuple loss works on the same set without listing it.

    Args:
        embeddings: ``(N, d)``; brought to length 1 before distances are taken.
        labels: Class ids ``(N,)``, any integers.
        margin: Keep impostors with ``0 < d(anchor, impostor) - d(anchor, positive) <= margin``.

    Raises:
        MethodError: There is not one label for each embedding.
    """
    check_batch(labels, embeddings)
    with torch.no_grad():
        x = unit_rows(embeddings)
        mined = []
        for block in blocks(labels):
            distance = root(squared_from(x, block.anchor))
            inside = within_margin(distance, block, margin)
            row, slot, impostor = (inside * block.real[:, :, None]).nonzero(as_tuple=True)
            mined.append(Triplets(block.anchor[row], block.positive[row, slot], impostor))
    return _joined(mined, labels)


def blocks(labels: Tensor) -> Iterator[Block]:
    """Deal all images whose class has another image into blocks of anchors, largest classes first.

    Each block is as large as the ``(R, P, N)`` numbers that compare its pairs with all images may be: what fits the
    cache on a CPU, and N² on an accelerator, where few large steps are better.
    """
    total = len(labels)
    _, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    size = counts[index]
    order = (size * len(counts) + index).argsort(descending=True)  # classes lie together, and equal sizes too
    size = size[order]
    place = torch.arange(total, device=labels.device)
    offset = (place - torch.searchsorted(-size, -size)) % size  # place within its class
    sizes = size.tolist()
    capacity = CACHE if labels.device.type == "cpu" else total**2
    begin = 0
    while begin < total and sizes[begin] > 1:
        largest = sizes[begin]
        rows = slice(begin, begin + max(1, capacity // (largest * total)))
        step = torch.arange(largest, device=labels.device)
        own = size[rows, None]
        yield Block(
            members=order[(place - offset)[rows, None] + (offset[rows, None] + step) % own],
            real=step[1:] < own,
        )
        begin = rows.stop


def squared_from(x: Tensor, anchor: Tensor) -> Tensor:
    """Squared distances ``(R, N)`` from the anchors to all rows of ``x``, not below 0."""
    square = x.square().sum(1)
    with torch.autocast(x.device.type, enabled=False):
        squared = torch.addmm(square, x[anchor], x.T, alpha=-2)
    return squared.add_(square[anchor, None]).clamp_min_(0)


def nearest_farther(squared: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """For each entry of ``reach``, the column of the smallest number in its row that is strictly greater.

    Args:
        squared: ``(R, N)``, values up to 4 (unit rows), or infinite for columns not to be taken.
        reach: ``(R, P)``.

    Returns:
        Columns ``(R, P)``, and whether there is such a number, ``(R, P)``.
    """
    if reach.shape[1] >= SORT_FROM:
        ascending, order = squared.sort(1)
        place = torch.searchsorted(ascending, reach, right=True).clamp_max(squared.shape[1] - 1)
        return order.gather(1, place), (ascending.gather(1, place) > reach) & (ascending.gather(1, place) < torch.inf)
    rows, positives = reach.shape
    squared = F.pad(squared, (0, -squared.shape[1] % STRIPES), value=torch.inf)[:, None]
    # A comparison written into floats runs an order of magnitude faster than a mask of booleans and where().
    ranked = torch.empty(rows, positives, squared.shape[2], dtype=squared.dtype, device=squared.device)
    torch.le(squared, reach[:, :, None], out=ranked)
    torch.add(squared, ranked, alpha=8, out=ranked)  # what is not farther goes behind everything that is
    # min() with an index is slow and amin() is fast: find the winner's column among stripes, then its stripe.
    ranked = ranked.view(rows, positives, STRIPES, -1)
    column = ranked.amin(2).min(2).indices[:, :, None, None]
    least, stripe = ranked.gather(3, column.expand(-1, -1, STRIPES, -1)).squeeze(3).min(2)
    return stripe * ranked.shape[3] + column[:, :, 0, 0], least < 8


def within_margin(distance: Tensor, block: Block, margin: float) -> Tensor:
    """Mark with 1.0 the impostors of each pair that are farther than the positive, by up to ``margin``.

    Args:
        distance: ``(R, N)`` from the block's anchors.
        block: The anchors and their positives.
        margin: The greatest difference of distances.

    Returns:
        ``(R, P, N)`` zeros and ones, in the dtype of ``distance``.
    """
    reach = distance.gather(1, block.positive)[:, :, None]
    others = distance.scatter(1, block.members, torch.inf)[:, None]
    inside = distance.new_empty(*block.real.shape, distance.shape[1])
    torch.le(others, reach + margin, out=inside)
    return inside.sub_(torch.le(others, reach, out=torch.empty_like(inside)))


def check_batch(labels: Tensor, *embeddings: Tensor) -> None:
    """Check that there are as many labels ``(N,)`` as rows of each ``(N, d)``, and at least one.

    Raises:
        MethodError: They differ.
    """
    if labels.ndim == 1 and len(labels) > 0 and all(x.ndim == 2 and len(x) == len(labels) for x in embeddings):
        return
    shapes = " and ".join(str(tuple(x.shape)) for x in embeddings)
    raise MethodError(
        f"a batch of N > 0 images needs rows (N, d) and class ids (N,), but got {shapes} with labels "
        f"{tuple(labels.shape)}; flatten the rows, and give one class id for each image"
    )


def _triplets(block: Block, impostor: Tensor, keep: Tensor) -> Triplets:
    return Triplets(block.anchor[:, None].expand_as(keep)[keep], block.positive[keep], impostor[keep])


def _joined(mined: list[Triplets], labels: Tensor) -> Triplets:
    if not mined:
        nothing = labels.new_empty(0, dtype=torch.int64)
        return Triplets(nothing, nothing, nothing)
    return Triplets(*(torch.cat(indices) for indices in zip(*mined, strict=True)))
