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
    """Fit a scikit-learn classifier to L2-normalised embeddings, and return its predicted class ids ``(M,)``.

    Args:
        classifier: An object with ``fit`` and ``predict``.
        train_embedding: ``(N, d)``.
        train_labels: Class ids ``(N,)``.
        embedding: ``(M, d)``.
    """
    classifier.fit(unit_rows(train_embedding).double().numpy(), train_labels.numpy())
    return torch.from_numpy(classifier.predict(unit_rows(embedding).double().numpy()))


def check_inverse_strength(C: float) -> None:
    """Check that C is greater than 0.

    Raises:
        MethodError: It is not.
    """
    if not C > 0:
        raise MethodError(f"C must be greater than 0, but is {C}")


def logistic_regression(train_embedding: Tensor, train_labels: Tensor, embedding: Tensor, C: float = 1.0) -> Tensor:
    """Predict class ids ``(M,)`` by L2-regularised logistic regression, solved by L-BFGS; see :func:`fit_and_predict`.

    Args:
        train_embedding: ``(N, d)``.
        train_labels: Class ids ``(N,)``.
        embedding: ``(M, d)``.
        C: Inverse strength of the regularisation, as in scikit-learn.
    """
    from sklearn.linear_model import LogisticRegression  # importing the methods must need only torch

    return fit_and_predict(LogisticRegression(C=C, max_iter=1000), train_embedding, train_labels, embedding)


def linear_probe(student: None, teacher: ModelShape, *, C: float = 1.0) -> Readout:
    """Classify by logistic regression on the teacher's normalised embedding; trains no student.

    Args:
        student: Must be None.
        teacher: The teacher.
        C: Inverse strength of the regularisation, as in scikit-learn.
    """
    check_inverse_strength(C)
    return Readout(partial(logistic_regression, C=C))
