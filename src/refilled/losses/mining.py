"""Which images to compare: semi-hard triplets, mined from a batch.

An image is an **anchor**; another image of its class is a **positive**; an image of another class is an
**impostor** (the triplet's negative). A triplet is **semi-hard** where the impostor is farther from the anchor than
the positive is (Schroff et al., FaceNet, CVPR 2015). Mining needs no gradients and returns indices, so that any loss
can use it.

No ``(N, N, N)`` mask is ever made. The T pairs of one class, about N²/C of them, are compared with all images, a few
pairs at a time, so that the numbers in flight fit a processor's cache.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refilled.errors import MethodError
from refilled.losses.distances import pairwise_distances, squared_distances, unit_rows

CACHE = 2**17  # numbers of a temporary, half a MiB in float32: the best in benchmarks/mining.py
STRIPES = 16  # see nearest_impostors; likewise


class Pairs(NamedTuple):
    """T ordered pairs of images of one class, as row numbers of the batch."""

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
    """For each anchor and each other image of its class, the nearest impostor farther away than that image.

    The rule of ReFilled's stage 1 (Ye, Lu and Zhan, CVPR 2020, section 4.1). A pair without such an impostor gives no
    triplet, so there are at most as many triplets as ordered pairs of one class.

    Args:
        embeddings: ``(N, d)``; brought to length 1 before distances are taken.
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
        distances = pairwise_distances(unit_rows(embeddings))
        mined = []
        for pairs, inside in impostors_within(distances, same_class_pairs(labels), margin):
            pair, negative = inside.nonzero(as_tuple=True)
            mined.append(Triplets(pairs.anchor[pair], pairs.positive[pair], negative))
    return Triplets(*(torch.cat(indices) for indices in zip(*mined, strict=True)))


def same_class_pairs(labels: Tensor) -> Pairs:
    """All ordered pairs of different images of one class, anchors together."""
    order = labels.argsort()
    ordered = labels[order]
    first = torch.searchsorted(ordered, ordered)  # where the class of each image begins
    others = torch.searchsorted(ordered, ordered, right=True) - first - 1
    anchor = torch.arange(len(labels), device=labels.device).repeat_interleave(others)
    nth = torch.arange(len(anchor), device=labels.device) - (others.cumsum(0) - others)[anchor]
    positive = first[anchor] + nth
    positive += positive >= anchor  # step over the anchor itself
    return Pairs(order[anchor], order[positive])


def nearest_impostors(squared: Tensor, pairs: Pairs) -> Triplets:
    """For each pair, the nearest image strictly farther from the anchor than the positive, outside the class.

    Non-negative floats are ordered like the integers of the same bits, and sums of integers wrap around. So one
    addition puts what is farther first, nearest to farthest, and all the rest behind it, and a minimum finds it.

    Args:
        squared: Squared distances ``(N, N)``, none below 0.
        pairs: All pairs of one class.

    Returns:
        The pairs that have an impostor, with it.
    """
    integers = torch.int64 if squared.dtype == torch.float64 else torch.int32
    bits = F.pad(squared, (0, -squared.shape[1] % STRIPES)).view(integers)
    reach = bits[pairs]
    bits[pairs] = 0  # nobody is nearer, so an image of the same class is never farther than the positive
    bits.fill_diagonal_(0)
    shift = (torch.iinfo(integers).max - reach)[:, None]  # the first number beyond reach becomes the lowest integer
    # min() with an index is slow and amin() is fast: find the winner's column among stripes, then its stripe.
    width = bits.shape[1] // STRIPES
    column = torch.empty_like(pairs.anchor)
    for anchor, part, out in _parts(bits.shape[1], pairs.anchor, shift, column):
        ranked = bits.index_select(0, anchor).add_(part).view(len(anchor), STRIPES, width)
        out.copy_(ranked.amin(1).min(1).indices)
    least, stripe = (bits.view(-1, STRIPES, width)[pairs.anchor, :, column] + shift).min(1)
    found = (least < 0).nonzero()[:, 0]
    return Triplets(pairs.anchor[found], pairs.positive[found], (stripe * width + column)[found])


def impostors_within(distances: Tensor, pairs: Pairs, margin: float) -> Iterator[tuple[Pairs, Tensor]]:
    """Mark the impostors that are farther from the anchor than the positive, by up to ``margin``.

    Args:
        distances: ``(N, N)``.
        pairs: All pairs of one class.
        margin: The greatest difference of distances.

    Yields:
        A few of the pairs, and for them ``(t, N)`` zeros and ones in the dtype of ``distances``. Comparing in floats
        is an order of magnitude faster than with masks of booleans.
    """
    reach = distances[pairs][:, None]
    others = distances.clone()
    others[pairs] = torch.inf
    others.fill_diagonal_(torch.inf)
    for anchor, positive, near in _parts(len(distances), pairs.anchor, pairs.positive, reach):
        row = others.index_select(0, anchor)
        yield Pairs(anchor, positive), row.clone().le_(near + margin).sub_(row.le_(near))


def _parts(width: int, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut columns ``(T, ...)`` into parts that make ``(t, width)`` numbers fit the cache of a CPU.

    On an accelerator few large parts are better; the limit there is a matrix of width × width.
    """
    rows = max(1, CACHE // width if columns[0].device.type == "cpu" else width)
    for begin in range(0, max(1, len(columns[0])), rows):  # one part even of nothing
        yield tuple(column[begin : begin + rows] for column in columns)


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
