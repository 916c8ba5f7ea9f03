"""Distances between embeddings, and the centres of classes.

Everything here computes in float32 or better, also under autocast: half precision cannot tell apart the distances
that a triplet compares.
"""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return half-precision values as float32, others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def lengths(x: Tensor) -> Tensor:
    """Euclidean length of each row of ``(N, d)``, as ``(N, 1)``; infinite for a row of zeros.

    A row of zeros has no direction. Divided by an infinite length it stays zero, with a gradient of zero.
    """
    length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return length.where(length != 0, torch.inf)


def unit_rows(x: Tensor) -> Tensor:
    """Scale each row of ``(N, d)`` to length 1, in float32 or better; a row of zeros stays as it is."""
    x = at_least_float32(x)
    return x / lengths(x)


def squared_distances(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Squared Euclidean distance between every row of ``a`` and every row of ``b``.

    Args:
        a: ``(N, d)``.
        b: ``(M, d)``; ``a`` itself when left out, and then the diagonal is exactly 0.

    Returns:
        ``(N, M)``, never negative.
    """
    a = at_least_float32(a)
    other = a if b is None else at_least_float32(b)
    # A common shift changes no distance, and taking the mean away leaves fewer digits to cancel.
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
    """Euclidean distance between every row of ``a`` and every row of ``b``.

    Where two rows coincide, the distance has no derivative; its gradient there is 0.

    Args:
        a: ``(N, d)``.
        b: ``(M, d)``; ``a`` itself when left out.

    Returns:
        ``(N, M)``.
    """
    return root(squared_distances(a, b))


def pair_distances(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Euclidean distances ``(T,)`` of the pairs with row numbers ``rows`` and ``columns`` ``(T,)`` in ``(N, d)``."""
    square = x.square().sum(1)
    with torch.autocast(x.device.type, enabled=False):
        products = (x @ x.T).take(rows * len(x) + columns)  # to make all N² costs less than to gather 2·T·d numbers
    return root(square[rows] + square[columns] - 2 * products)


def root(squared: Tensor) -> Tensor:
    """Square root with gradient 0, instead of infinity, at and below 0."""
    smallest = torch.finfo(squared.dtype).tiny  # a power of 4, so that its root is exact and 0 stays 0
    return torch.sub(squared.clamp_min(smallest).sqrt(), smallest**0.5)


def class_centers(embedding: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean embedding of each class that is present.

    Args:
        embedding: ``(N, d)``.
        labels: Class ids ``(N,)``, any integers.

    Returns:
        Centres ``(C', d)`` and the ids ``(C',)`` of their classes, ascending.
    """
    embedding = at_least_float32(embedding)
    classes, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = embedding.new_zeros(len(classes), embedding.shape[1]).index_add(0, index, embedding)
    return sums / counts[:, None], classes
