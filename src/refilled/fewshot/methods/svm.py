r"""Linear one-against-rest support vector machines with the squared hinge, on a frozen embedding.

.. math:: \min_{w, b} \frac{1}{2}\|w\|^2 + C \sum_x \max(0, 1 - y\,(w^\top\phi(x) + b))^2, \qquad y = \pm 1

References:
    Fan et al., LIBLINEAR, JMLR 2008 (its L2-regularised L2-loss SVM; but here the intercept is not penalised).
"""

from torch import Tensor

from refilled.fewshot.bank import Bank, Learner, normalized, on_embeddings, one_hot
from refilled.fewshot.ridge import Ridge, by_blocks, descend, read


def support_vector_machine(
    support: Tensor, labels: Tensor, query: Tensor, *, c: float = 1.0, tolerance: float = 1e-4
) -> Tensor:
    """Return the margins of T times N support vector machines, fitted together.

    The second derivative of the squared hinge is discontinuous and at most 2, so the steps use that bound.

    Args:
        support: ``(T, S, d)``.
        labels: ``(S,)``, 0 .. N - 1.
        query: ``(T, Q, d)``.
        c: Weight C of the hinge.
        tolerance: When to stop; see :func:`~refilled.fewshot.ridge.descend`.

    Returns:
        ``(T, Q, N)``.
    """
    sign = 2 * one_hot(labels, support).T - 1  # (N, S)

    def residual(scores: Tensor) -> Tensor:
        return sign * (1 - sign * scores).clamp(min=0)

    def fit(support: Tensor) -> Tensor:
        ridge = Ridge(support, 1 / (2 * c))
        return ridge.weights(descend(ridge, residual, len(sign), tolerance))

    return read(query, by_blocks(fit, support))


def svm(bank: Bank, *, c: float = 1.0, normalize: bool = True) -> Learner:
    """Linear SVM on the model's embedding, L2-normalised by default (SVM)."""

    def classify(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        return support_vector_machine(normalized(support, normalize), labels, normalized(query, normalize), c=c)

    return on_embeddings(bank, classify)
