r"""Linear classifiers of many tasks at once, each step one product of small matrices.

A loss of the scores with a bounded second derivative lies below a parabola that touches it at the present scores F.
The minimum of the parabola plus :math:`\frac{1}{2}\|W\|^2` is a ridge regression onto a working response Z(F), so that

.. math:: F \leftarrow H\,Z(F)

goes down to the minimum of the loss, where H, the hat matrix of the ridge regression, depends on the images alone: it
is computed once, from inner products, whatever the size of the embedding.

References:
    Böhning, Multinomial logistic regression algorithm, Annals of the Institute of Statistical Mathematics 1992;
    Nesterov's acceleration with restarts: O'Donoghue and Candès, Foundations of Computational Mathematics 2015.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def hat_matrices(support: Tensor, query: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    r"""What takes responses to the scores that ridge regression with a free intercept fits to them.

    Least are :math:`\|X W + b - Z\|^2 + \lambda \|W\|^2`.

    Args:
        support: X, ``(T, S, d)``.
        query: ``(T, Q, d)``.
        penalty: :math:`\lambda`.

    Returns:
        ``(T, S, S)`` for the scores of the support images, ``(T, Q, S)`` for those of the query images.
    """
    mean = support.mean(1, keepdim=True)
    centered = support - mean
    images = support.shape[1]
    gram = centered @ centered.mT
    damped = gram + penalty * torch.eye(images, dtype=gram.dtype, device=gram.device)
    dual = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    dual = dual - dual.mean(2, keepdim=True)  # the response is centred too
    cross = query @ centered.mT - mean @ centered.mT  # of the centred query, without a copy of it
    return gram @ dual + 1 / images, cross @ dual + 1 / images


def iterate(
    hat: Tensor, response: Callable[[Tensor], Tensor], classes: int, tolerance: float = 1e-4, limit: int = 1000
) -> Tensor:
    """Go to where the scores are the ridge fit of their own working response.

    Each task stops for itself, so that its result does not depend on the others.

    Args:
        hat: ``(T, S, S)``.
        response: Maps scores ``(T, S, N)`` to the working response ``(T, S, N)``.
        classes: Number N of classes.
        tolerance: A task is done when a step changes none of its scores by more.
        limit: Steps at most.

    Returns:
        The working response ``(T, S, N)`` where it ends.
    """
    scores = hat.new_zeros(len(hat), hat.shape[1], classes)
    ahead, momentum = scores, hat.new_ones(len(hat), 1, 1)
    active = torch.ones_like(momentum, dtype=torch.bool)
    for _ in range(limit):
        moved = torch.where(active, hat @ response(ahead), scores)
        step = moved - scores
        active = active & ((moved - ahead).abs().amax((1, 2), keepdim=True) > tolerance)
        if not active.any():
            return response(moved)
        uphill = ((ahead - moved) * step).sum((1, 2), keepdim=True) > 0
        momentum = torch.where(uphill, 1.0, momentum)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead = torch.where(active, moved + (momentum - 1) / following * step, moved)
        scores, momentum = moved, following
    return response(scores)
