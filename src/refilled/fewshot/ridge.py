r"""Linear classifiers of many tasks at once. Each step is a few products of small matrices.

Near the current scores F, a loss with second derivative h is approximated by a parabola. Minimising the parabola plus
:math:`\frac{1}{2}\|W\|^2` is a ridge regression, with penalty 1 / h, onto the working response F + R(F), where R is
the negative gradient divided by h. The matrix of this regression depends on the images alone, so it is inverted once.
Its size is the embedding dimension or the number of images, whichever is smaller. If h is an upper bound of the second
derivative, every step decreases the loss (:func:`descend`). If h is a typical value, steps are longer, and earlier
steps are used to extrapolate the next (:func:`extrapolate`).

Scores are stored class-major, ``(T, N, S)``. The products then take a fifth of the time, and the softmax a tenth.

References:
    Böhning, Multinomial logistic regression algorithm, Annals of the Institute of Statistical Mathematics 1992;
    Nesterov's acceleration with restarts: O'Donoghue and Candès, Foundations of Computational Mathematics 2015;
    Anderson's extrapolation: Walker and Ni, SIAM Journal on Numerical Analysis 2011.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

_NUMBERS_TOGETHER = 500_000  # entries of support embeddings that fit in a processor's cache
_TASKS_TOGETHER = 16  # at least
_REMEMBERED = 4  # earlier steps that an extrapolation uses
_PATIENCE = 60  # steps after which a task is given up


Residual = Callable[[Tensor], Tensor]
"""Maps scores ``(T, N, S)`` to the negative gradient of the loss divided by its second derivative, same shape."""


class Ridge:
    r"""Ridge regressions of T tasks with unpenalised intercepts.

    .. math:: \min_{W, b} \|W X^\top + b - Z\|^2 + \lambda \|W\|^2

    Coefficients ``(T, N, P + 1)`` are P weights and the intercept. P is d, the embedding dimension, or S, the number of
    images, whichever is smaller.

    Args:
        support: X, ``(T, S, d)``.
        penalty: :math:`\lambda`.
    """

    def __init__(self, support: Tensor, penalty: float) -> None:
        self.mean = support.mean(1, keepdim=True)
        self.centered = support - self.mean
        images, dim = support.shape[1:]
        self.of_images = images <= dim
        by = self.centered @ self.centered.mT if self.of_images else self.centered
        self.basis = torch.cat([by, by.new_ones(len(by), images, 1)], 2)  # (T, S, P + 1)
        damped = by if self.of_images else self.centered.mT @ self.centered
        damped.diagonal(dim1=1, dim2=2).add_(penalty)
        size = len(damped[0])
        self.inverse = by.new_zeros(len(by), size + 1, size + 1)
        self.inverse[:, :size, :size] = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        self.inverse[:, size, size] = 1 / images
        self.penalty = by.new_full((size + 1,), penalty)
        self.penalty[size] = 0

    def nothing(self, classes: int) -> Tensor:
        """Return zero coefficients ``(T, N, P + 1)``."""
        return self.basis.new_zeros(len(self.basis), classes, self.basis.shape[2])

    def scores(self, coefficients: Tensor) -> Tensor:
        """Return the scores ``(T, N, S)`` of the support images."""
        return coefficients @ self.basis.mT

    def step(self, coefficients: Tensor, residual: Tensor) -> Tensor:
        """Return the change of coefficients that fits their scores plus ``residual`` ``(T, N, S)``."""
        pulled = torch.cat([residual, residual.sum(2, keepdim=True)], 2) if self.of_images else residual @ self.basis
        return (pulled - self.penalty * coefficients) @ self.inverse

    def weights(self, coefficients: Tensor) -> Tensor:
        """Return the d weights followed by the intercept, ``(T, N, d + 1)``."""
        weights, intercept = coefficients[..., :-1], coefficients[..., -1:]
        if self.of_images:
            weights = weights @ self.centered
        return torch.cat([weights, intercept - weights @ self.mean.mT], 2)


def read(query: Tensor, weights: Tensor) -> Tensor:
    """Return the scores ``(T, Q, N)`` of query images ``(T, Q, d)``, given :meth:`Ridge.weights`."""
    return query @ weights[..., :-1].mT + weights[..., -1:].mT


def descend(ridge: Ridge, residual: Residual, classes: int, tolerance: float, limit: int = 1000) -> Tensor:
    """Find the coefficients that are the ridge fit of their own working response, by Nesterov's steps.

    Each task stops independently, so that its result does not depend on the others.

    Args:
        ridge: The regressions.
        residual: See :data:`Residual`, with an upper bound of the second derivative.
        classes: Number N of classes.
        tolerance: A task is done when a step changes none of its scores by more than this.
        limit: Maximum number of steps.

    Returns:
        The final coefficients ``(T, N, P + 1)``.
    """
    at = ahead = ridge.nothing(classes)
    scores = scores_ahead = ridge.scores(at)
    momentum = at.new_ones(len(at), 1, 1)
    active = torch.ones_like(momentum, dtype=torch.bool)
    for _ in range(limit):
        moved = torch.where(active, ahead + ridge.step(ahead, residual(scores_ahead)), at)
        moved_scores = ridge.scores(moved)
        back, step = scores_ahead - moved_scores, moved_scores - scores
        active = active & (back.abs().amax((1, 2), keepdim=True) > tolerance)
        if not active.any():
            return moved
        uphill = (back * step).sum((1, 2), keepdim=True) > 0
        momentum = torch.where(uphill, 1.0, momentum)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        share = torch.where(active, (momentum - 1) / following, 0.0)
        ahead, scores_ahead = moved + share * (moved - at), moved_scores + share * step
        at, scores, momentum = moved, moved_scores, following
    return at


def extrapolate(ridge: Ridge, residual: Residual, classes: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Find the same coefficients by Anderson's extrapolation, in fewer steps where the loss is smooth.

    Convergence is not guaranteed. A task that has converged is at the minimum, the only fixed point.

    Args:
        ridge: See :func:`descend`.
        residual: See :data:`Residual`, with any second derivative.
        classes: See :func:`descend`.
        tolerance: See :func:`descend`.

    Returns:
        The coefficients ``(T, N, P + 1)``, and a mask ``(T,)`` of the tasks that converged.
    """
    at = ridge.nothing(classes)
    active = torch.ones(len(at), 1, 1, dtype=torch.bool, device=at.device)
    steps: list[Tensor] = []
    moves: list[Tensor] = []
    for _ in range(_PATIENCE):
        step = ridge.step(at, residual(ridge.scores(at)))
        active = active & (ridge.scores(step).abs().amax((1, 2), keepdim=True) > tolerance)
        if not active.any():
            break
        steps = [*steps, step.flatten(1)][-_REMEMBERED - 1 :]
        move = torch.where(active, _aimed(steps, moves).view_as(at), 0.0)
        moves = [*moves, move.flatten(1)][-_REMEMBERED:]
        at = at + move
    return at, ~active.flatten() & at.isfinite().all(2).all(1)


def _aimed(steps: Sequence[Tensor], moves: Sequence[Tensor]) -> Tensor:
    """Return the next move ``(T, D)``, given the steps ``(T, D)`` so far, latest last, and the moves between them.

    It is the step from the mixture of earlier points at which a linear model of the step is shortest.
    """
    if not moves:
        return steps[-1]
    changes = torch.stack([after - before for before, after in pairwise(steps)], 1)  # (T, M, D)
    products = changes @ changes.mT
    products.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6).add_(torch.finfo(products.dtype).tiny)
    shares = torch.linalg.solve(products, changes @ steps[-1][..., None])  # (T, M, 1)
    aimed: Tensor = steps[-1] - ((changes + torch.stack(list(moves), 1)).mT @ shares)[..., 0]
    return aimed


def by_blocks(fit: Callable[[Tensor], Tensor], support: Tensor) -> Tensor:
    """Fit in groups of tasks whose matrices fit in the processor's cache. On other devices, fit all at once."""
    together = len(support)
    if support.device.type == "cpu":
        together = max(_TASKS_TOGETHER, _NUMBERS_TOGETHER // support[0].numel())
    return torch.cat([fit(block) for block in support.split(together)])
