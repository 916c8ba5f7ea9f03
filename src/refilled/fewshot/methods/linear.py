r"""Logistic regression on a frozen embedding.

.. math:: \min_{W, b} \frac{1}{2}\|W\|^2 + C \sum_x \mathrm{CE}(W^\top\phi(x) + b, y)

References:
    Tian et al., Rethinking Few-Shot Image Classification: a Good Embedding Is All You Need?, ECCV 2020.
"""

from functools import partial

from torch import Tensor

from refilled.fewshot.bank import Bank, Learner, normalized, on_embeddings, one_hot
from refilled.fewshot.ridge import Ridge, by_blocks, descend, extrapolate, read


def logistic_regression(
    support: Tensor, labels: Tensor, query: Tensor, *, c: float = 1.0, tolerance: float = 1e-3
) -> Tensor:
    """Return the scores ``(T, Q, N)`` of query images ``(T, Q, d)``.

    The other arguments are those of :func:`logistic_weights`.
    """
    return read(query, logistic_weights(support, labels, c=c, tolerance=tolerance))


def logistic_weights(support: Tensor, labels: Tensor, *, c: float = 1.0, tolerance: float = 1e-3) -> Tensor:
    """Fit T logistic regressions together. The intercept is not penalised.

    The second derivative of the cross-entropy with respect to the scores is 1 / N at the start and at most 1 / 2. With
    1 / N few steps are needed. Tasks that do not converge with it are fitted with 1 / 2, which always converges.

    Args:
        support: ``(T, S, d)``.
        labels: ``(S,)``, 0 .. N - 1.
        c: Inverse regularisation strength C.
        tolerance: When to stop; see :func:`~refilled.fewshot.ridge.descend`. The default is closer to the minimum than
            scikit-learn's.

    Returns:
        ``(T, N, d + 1)``, the d weights followed by the intercept.
    """
    truth = one_hot(labels, support).T  # (N, S)
    classes = len(truth)

    def residual(scores: Tensor, curvature: float) -> Tensor:
        return (truth - scores.softmax(1)) / curvature

    def fit(support: Tensor) -> Tensor:
        usual = 1 / classes  # at the start, where all classes are equally probable
        ridge = Ridge(support, 1 / (c * usual))
        coefficients, arrived = extrapolate(ridge, partial(residual, curvature=usual), classes, tolerance)
        weights = ridge.weights(coefficients)
        if not arrived.all():
            ridge = Ridge(support[~arrived], 1 / (c * 0.5))
            coefficients = descend(ridge, partial(residual, curvature=0.5), classes, tolerance)
            weights[~arrived] = ridge.weights(coefficients)
        return weights

    return by_blocks(fit, support)


def linear(bank: Bank, *, c: float = 1.0, normalize: bool = True) -> Learner:
    """Logistic regression on the model's embedding, L2-normalised by default (LR)."""

    def classify(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        return logistic_regression(normalized(support, normalize), labels, normalized(query, normalize), c=c)

    return on_embeddings(bank, classify)
