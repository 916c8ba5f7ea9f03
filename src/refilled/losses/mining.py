"""Semi-hard triplets, mined from a batch.

The **anchor** is an image, the **positive** another image of its class, and the **impostor** (the triplet's negative)
an image of another class. A triplet is **semi-hard** if the impostor is farther from the anchor than the positive is
(Schroff et al., FaceNet, CVPR 2015). Mining needs no gradients and returns indices, so any loss can use it.

No ``(N, N, N)`` mask is built. The T same-class pairs, about N²/C of them, are compared with all images in parts small
enough for a processor's cache.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refilled.errors import MethodError
from refilled.losses.distances import pairwise_distances, squared_distances, unit_rows

CACHE = 2**17  # elements of a temporary, half a MiB in float32; the fastest in benchmarks/mining.py
STRIPES = 16  # see nearest_impostors; also the fastest in benchmarks/mining.py


class Pairs(NamedTuple):
    """T ordered pairs of images of the same class, as row numbers of the batch."""

    anchor: Tensor
    """``(T,)``."""

    positive: Tensor
    """``(T,)``: another image of the anchor's class."""


class Triplets(NamedTuple):
    """T triplets as row numbers of the batch, in no particular order."""

    anchor: Tensor
    """``(T,)``."""

    positive: Tensor
    """``(T,)``: another image of the anchor's class."""

    negative: Tensor
    """``(T,)``: an image of another class, farther from the anchor than the positive."""


def semi_hard_triplets(embeddings: Tensor, labels: Tensor) -> Triplets:
    """Return, for each anchor and positive, the nearest impostor that is farther away than the positive.

    This is the rule of ReFilled's stage 1 (Ye, Lu and Zhan, CVPR 2020, section 4.1). A pair without such an impostor
    gives no triplet, so there are at most as many triplets as ordered same-class pairs.

    Args:
        embeddings: ``(N, d)``; scaled to length 1 before distances are computed.
        labels: Class ids ``(N,)``, any integers.

    Raises:
        MethodError: There is not one label for each embedding.

    >>> at = torch.tensor([0.0, 0.3, 0.5, 1.1])
    >>> semi_hard_triplets(torch.stack([at.cos(), at.sin()], 1), torch.tensor([7, 7, 2, 2]))._asdict()
    {'anchor': tensor([3, 0, 1]), 'positive': tensor([2, 1, 0]), 'negative': tensor([1, 2, 3])}
    """
    check_batch(labels, embeddings)
    with torch.no_grad():
        return nearest_impostors(squared_distances(unit_rows(embeddings)), same_class_pairs(labels))


def all_semi_hard_triplets(embeddings: Tensor, labels: Tensor, *, margin: float = 0.2) -> Triplets:
    """Return, for each anchor and positive, **all** impostors that are farther away by up to ``margin``.

    There may be of the order of N³/C triplets. The tuple loss uses the same set without listing it.

    Args:
        embeddings: ``(N, d)``; scaled to length 1 before distances are computed.
        labels: Class ids ``(N,)``, any integers.
        margin: Keep impostors with ``0 < d(anchor, impostor) - d(anchor, positive) <= margin``.

    Raises:
        MethodError: There is not one label for each embedding.
    """
    check_batch(labels, embeddings)
    with torch.no_grad():
        distances = pairwise_distances(unit_rows(embeddings))
        mined = []
        for pairs, inside in impostors_within(distances, same_class_pairs(labels), margin):
            pair, negative = inside.nonzero(as_tuple=True)
            mined.append(Triplets(pairs.anchor[pair], pairs.positive[pair], negative))
    return Triplets(*(torch.cat(indices) for indices in zip(*mined, strict=True)))


def same_class_pairs(labels: Tensor) -> Pairs:
    """Return all ordered pairs of different images of the same class, grouped by anchor."""
    order = labels.argsort()
    ordered = labels[order]
    first = torch.searchsorted(ordered, ordered)  # where the class of each image starts
    others = torch.searchsorted(ordered, ordered, right=True) - first - 1
    anchor = torch.arange(len(labels), device=labels.device).repeat_interleave(others)
    nth = torch.arange(len(anchor), device=labels.device) - (others.cumsum(0) - others)[anchor]
    positive = first[anchor] + nth
    positive += positive >= anchor  # skip the anchor itself
    return Pairs(order[anchor], order[positive])


def nearest_impostors(squared: Tensor, pairs: Pairs) -> Triplets:
    """Return, for each pair, the nearest image of another class that is strictly farther than the positive.

    Non-negative floats have the same order as the integers with the same bits, and integer addition wraps around. One
    addition therefore makes the farther images the lowest integers, nearest first, and a minimum finds the nearest.

    Args:
        squared: Squared distances ``(N, N)``, none below 0.
        pairs: All same-class pairs.

    Returns:
        The pairs that have an impostor, with that impostor.
    """
    integers = torch.int64 if squared.dtype == torch.float64 else torch.int32
    bits = F.pad(squared, (0, -squared.shape[1] % STRIPES)).view(integers)
    reach = bits[pairs]
    bits[pairs] = 0  # no distance is smaller, so an image of the same class is never farther than the positive
    bits.fill_diagonal_(0)
    shift = (torch.iinfo(integers).max - reach)[:, None]  # the first number above reach becomes the lowest integer
    # min() with an index is slow and amin() is fast. Find the column within the stripes first, then the stripe.
    width = bits.shape[1] // STRIPES
    column = torch.empty_like(pairs.anchor)
    for anchor, part, out in _parts(bits.shape[1], pairs.anchor, shift, column):
        ranked = bits.index_select(0, anchor).add_(part).view(len(anchor), STRIPES, width)
        out.copy_(ranked.amin(1).min(1).indices)
    least, stripe = (bits.view(-1, STRIPES, width)[pairs.anchor, :, column] + shift).min(1)
    kept = (least < 0).nonzero()[:, 0]
    return Triplets(pairs.anchor[kept], pairs.positive[kept], (stripe * width + column)[kept])


def impostors_within(distances: Tensor, pairs: Pairs, margin: float) -> Iterator[tuple[Pairs, Tensor]]:
    """Mark the impostors that are farther from the anchor than the positive, by up to ``margin``.

    Args:
        distances: ``(N, N)``.
        pairs: All same-class pairs.
        margin: Largest difference of distances.

    Yields:
        A part of t pairs, and their marks ``(t, N)``, zeros and ones in the dtype of ``distances``. Comparison in
        floats is an order of magnitude faster than boolean masks.
    """
    reach = distances[pairs][:, None]
    others = distances.clone()
    others[pairs] = torch.inf
    others.fill_diagonal_(torch.inf)
    for anchor, positive, near in _parts(len(distances), pairs.anchor, pairs.positive, reach):
        row = others.index_select(0, anchor)
        yield Pairs(anchor, positive), row.clone().le_(near + margin).sub_(row.le_(near))


def _parts(width: int, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split columns ``(T, ...)`` into parts such that ``(t, width)`` numbers fit the cache of a CPU.

    On an accelerator, few large parts are faster; the limit there is a matrix of width × width.
    """
    rows = max(1, CACHE // width if columns[0].device.type == "cpu" else width)
    for begin in range(0, max(1, len(columns[0])), rows):  # one part even if there are no pairs
        yield tuple(column[begin : begin + rows] for column in columns)


def check_batch(labels: Tensor, *embeddings: Tensor) -> None:
    """Check that there is one label ``(N,)`` per row of each ``(N, d)``, and at least one row.

    Raises:
        MethodError: The shapes do not fit, or the batch is empty.
    """
    if labels.ndim == 1 and len(labels) > 0 and all(x.ndim == 2 and len(x) == len(labels) for x in embeddings):
        return
    shapes = " and ".join(str(tuple(x.shape)) for x in embeddings)
    raise MethodError(
        f"a batch of N > 0 images needs rows (N, d) and class ids (N,), but got {shapes} with labels "
        f"{tuple(labels.shape)}; flatten the rows, and give one class id per image"
    )
