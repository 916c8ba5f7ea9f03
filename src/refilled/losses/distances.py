"""Distances between embeddings, and class centres.

All functions compute in float32 or better, also under autocast. Half precision cannot resolve the differences of
distance that a triplet compares.
"""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; return other types unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def lengths(x: Tensor) -> Tensor:
    """Return the Euclidean length of each row of ``(N, d)`` as ``(N, 1)``; the length of a zero row is infinite.

    A zero row has no direction. Division by an infinite length keeps it zero, with zero gradient.
    """
    length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return length.where(length != 0, torch.inf)


def unit_rows(x: Tensor) -> Tensor:
    """Scale each row of ``(N, d)`` to length 1, in float32 or better; a zero row is unchanged."""
    x = at_least_float32(x)
    return x / lengths(x)


def squared_distances(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Return the squared Euclidean distance between every row of ``a`` and every row of ``b``.

    Args:
        a: ``(N, d)``.
        b: ``(M, d)``. None: ``a`` itself, and the diagonal is exactly 0.

    Returns:
        ``(N, M)``, never negative.
    """
    a = at_least_float32(a)
    other = a if b is None else at_least_float32(b)
    # A common shift does not change distances. Subtracting the mean reduces cancellation.
    shift = other.detach().mean(0)
    a = a - shift
    other = a if b is None else other - shift
    square = a.square().sum(1, keepdim=True)
    with torch.autocast(a.device.type, enabled=False):
        squared: Tensor = torch.addmm(other.square().sum(1), a, other.T, alpha=-2).add_(square)
    if b is None:
        squared.fill_diagonal_(0)
    return squared.clamp_min_(0)


def pairwise_distances(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Return the Euclidean distance between every row of ``a`` and every row of ``b``.

    The distance has no derivative where two rows coincide; its gradient there is 0.

    Args:
        a: ``(N, d)``.
        b: ``(M, d)``. None: ``a`` itself.

    Returns:
        ``(N, M)``.
    """
    return root(squared_distances(a, b))


def pair_distances(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the distances ``(T,)`` of the pairs of rows of ``(N, d)`` that ``rows`` and ``columns`` ``(T,)`` index."""
    square = x.square().sum(1)
    with torch.autocast(x.device.type, enabled=False):
        products = (x @ x.T).take(rows * len(x) + columns)  # all N² cost less than gathering 2·T·d numbers
    return root(square[rows] + square[columns] - 2 * products)


def root(squared: Tensor) -> Tensor:
    """Return the square root; its gradient at and below 0 is 0 instead of infinity."""
    smallest = torch.finfo(squared.dtype).tiny  # a power of 4, so that its root is exact and 0 stays 0
    return torch.sub(squared.clamp_min(smallest).sqrt(), smallest**0.5)


def class_centers(embedding: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean embedding of each class that is present.

    Args:
        embedding: ``(N, d)``.
        labels: Class ids ``(N,)``, any integers.

    Returns:
        Centres ``(C', d)`` and the class ids ``(C',)``, ascending.
    """
    embedding = at_least_float32(embedding)
    classes, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = embedding.new_zeros(len(classes), embedding.shape[1]).index_add(0, index, embedding)
    return sums / counts[:, None], classes
