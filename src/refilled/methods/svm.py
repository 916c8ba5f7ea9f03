"""Linear support vector machine on the teacher's embedding.

References:
    Cortes and Vapnik, Support-Vector Networks, Machine Learning, 1995.
"""

from functools import partial

from torch import Tensor

from refilled.methods.linear_probe import check_inverse_strength, fit_and_predict
from refilled.outputs import ModelShape
from refilled.stages import Readout


def support_vectors(train_embedding: Tensor, train_labels: Tensor, embedding: Tensor, C: float = 1.0) -> Tensor:
    """Predict class ids ``(M,)`` by one-vs-rest linear SVMs on L2-normalised embeddings.

    Args:
        train_embedding: ``(N, d)``.
        train_labels: Class ids ``(N,)``.
        embedding: ``(M, d)``.
        C: Inverse strength of the regularisation, as in scikit-learn.
    """
    from sklearn.svm import LinearSVC  # importing the methods must need only torch

    return fit_and_predict(LinearSVC(C=C, random_state=0), train_embedding, train_labels, embedding)


def svm(student: None, teacher: ModelShape, *, C: float = 1.0) -> Readout:
    """Classify by a linear support vector machine on the teacher's normalised embedding; trains no student.

    Args:
        student: Must be None.
        teacher: The teacher.
        C: Inverse strength of the regularisation, as in scikit-learn.
    """
    check_inverse_strength(C)
    return Readout(partial(support_vectors, C=C))
