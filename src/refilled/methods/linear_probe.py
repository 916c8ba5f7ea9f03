"""Linear probe: logistic regression on the teacher's embedding.

References:
    Alain and Bengio, Understanding Intermediate Layers Using Linear Classifier Probes, 2016.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from refilled.errors import MethodError
from refilled.losses.distances import unit_rows
from refilled.outputs import ModelShape
from refilled.stages import Readout


def fit_and_predict(classifier: Any, train_embedding: Tensor, train_labels: Tensor, embedding: Tensor) -> Tensor:
    """Fit a classifier of scikit-learn to L2-normalised embeddings, and return the class ids ``(M,)`` that it predicts.

    Args:
        classifier: Has ``fit`` and ``predict``.
        train_embedding: ``(N, d)``.
        train_labels: Class ids ``(N,)``.
        embedding: ``(M, d)``.
    """
    classifier.fit(unit_rows(train_embedding).double().numpy(), train_labels.numpy())
    return torch.from_numpy(classifier.predict(unit_rows(embedding).double().numpy()))


def check_inverse_strength(C: float) -> None:
    """Refuse a C that no linear classifier takes.

    Raises:
        MethodError: it is not above 0.
    """
    if not C > 0:
        raise MethodError(f"C must be greater than 0, but is {C}")


def logistic_regression(train_embedding: Tensor, train_labels: Tensor, embedding: Tensor, C: float = 1.0) -> Tensor:
    """Predict class ids ``(M,)`` by L2-regularised logistic regression, solved by L-BFGS; see :func:`fit_and_predict`.

    Args:
        train_embedding: ``(N, d)``.
        train_labels: Class ids ``(N,)``.
        embedding: ``(M, d)``.
        C: Inverse strength of the regularisation, as scikit-learn counts it.
    """
    from sklearn.linear_model import LogisticRegression  # the losses beside this load torch alone

    return fit_and_predict(LogisticRegression(C=C, max_iter=1000), train_embedding, train_labels, embedding)


def linear_probe(student: None, teacher: ModelShape, *, C: float = 1.0) -> Readout:
    """Classify by logistic regression on the teacher's normalised embedding; trains no student.

    Args:
        student: None is needed.
        teacher: The teacher.
        C: Inverse strength of the regularisation, as scikit-learn counts it.
    """
    check_inverse_strength(C)
    return Readout(partial(logistic_regression, C=C))
