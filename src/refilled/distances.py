"""Distances between embeddings, and the centres of classes.

Everything here computes in float32 or better, also under autocast: half precision cannot tell apart the distances
that a triplet compares.
"""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return half-precision values as float32, others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor) -> Tensor:
    """Scale each row of ``(N, d)`` to length 1, in float32 or better.

    A row of zeros has no direction: it stays zero, with a gradient of zero instead of an infinite one.
    """
    x = at_least_float32(x)
    length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / length.where(length > torch.finfo(x.dtype).tiny ** 0.5, torch.inf)


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
    a, other = a - shift, other - shift
    with torch.autocast(a.device.type, enabled=False):
        squared = a.square().sum(1)[:, None] + other.square().sum(1) - 2 * (a @ other.T)
    if b is None:
        squared = squared.masked_fill(torch.eye(len(a), dtype=torch.bool, device=a.device), 0)
    return squared.clamp_min(0)


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
    """Euclidean distance of chosen pairs of rows of ``x``; 0 with gradient 0 where they coincide.

    Args:
        x: ``(N, d)``.
        rows: Index ``(T,)`` of one of each pair.
        columns: Index ``(T,)`` of the other.

    Returns:
        ``(T,)``.
    """
    x = at_least_float32(x)
    square = x.square().sum(1)
    with torch.autocast(x.device.type, enabled=False):
        products = (x @ x.T).flatten()  # N² numbers cost less to make than 2·T·d cost to gather
    return root(square[rows] + square[columns] - 2 * products[rows * len(x) + columns])


def root(squared: Tensor) -> Tensor:
    """Square root with gradient 0, instead of infinity, at and below 0."""
    zero = squared <= 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


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
