r"""Logistic regression on a frozen embedding.

.. math:: \min_{W, b} \frac{1}{2}\|W\|^2 + C \sum_x \mathrm{CE}(W^\top\phi(x) + b, y)

References:
    Tian et al., Rethinking Few-Shot Image Classification: a Good Embedding Is All You Need?, ECCV 2020.
"""

from torch import Tensor

from refilled.fewshot.bank import Bank, Learner, normalized, on_embeddings, one_hot
from refilled.fewshot.ridge import hat_matrices, iterate


def logistic_regression(
    support: Tensor, labels: Tensor, query: Tensor, *, c: float = 1.0, tolerance: float = 1e-4
) -> Tensor:
    """Scores of T logistic regressions, found together; the intercept is not penalised.

    The second derivative of the cross-entropy by the scores is at most a half, which makes the working response
    F - 2 (P - Y) and the penalty 2 / C.

    Args:
        support: ``(T, S, d)``.
        labels: ``(S,)``, 0 .. N - 1.
        query: ``(T, Q, d)``.
        c: The inverse strength of regularisation, C.
        tolerance: Where to stop; see :func:`~refilled.fewshot.ridge.iterate`.

    Returns:
        ``(T, Q, N)``.
    """
    truth = one_hot(labels, support)
    hat, to_query = hat_matrices(support, query, 2 / c)

    def response(scores: Tensor) -> Tensor:
        return scores - 2 * (scores.softmax(2) - truth)

    return to_query @ iterate(hat, response, truth.shape[1], tolerance)


def linear(bank: Bank, *, c: float = 1.0, normalize: bool = True) -> Learner:
    """Logistic regression on the model's embedding, L2-normalised unless told otherwise (LR)."""

    def classify(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        return logistic_regression(normalized(support, normalize), labels, normalized(query, normalize), c=c)

    return on_embeddings(bank, classify)
