"""Measures of an embedding on labelled images: held-out folds, their accuracies, and LogME."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refilled.data import Split
from refilled.losses.distances import class_centers, squared_distances, unit_rows
from refilled.methods.linear_probe import logistic_regression

FOLDS = 5

_LOGME_RANGE = 23.0  # of the logarithm of the ratio around that of the largest squared singular value: a factor of 1e10

Classify = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Predict class ids ``(M,)`` from training embeddings ``(N, d)``, their ids ``(N,)``, and embeddings ``(M, d)``."""


@dataclass(frozen=True)
class Accuracy:
    """An accuracy in percent and its 95 % interval (Wilson, 1927), which takes the images to be independent."""

    percent: float
    low: float
    high: float
    images: int

    @classmethod
    def of(cls, right: Tensor) -> Self:
        """Return the share of correct predictions; ``right`` has one boolean each, ``(N,)``, with N above 0."""
        from scipy.stats import binomtest

        found, images = int(right.sum()), len(right)
        interval = binomtest(found, images).proportion_ci(0.95, method="wilson")
        return cls(100 * found / images, 100 * float(interval.low), 100 * float(interval.high), images)

    @property
    def standard_error(self) -> float:
        """The standard error in percentage points."""
        share = self.percent / 100
        return 100 * math.sqrt(share * (1 - share) / self.images)


def folds_of(images: Split, seed: int = 0) -> Tensor:
    """Assign images to :data:`FOLDS` folds, stratified by class; images with equal pixels share a fold.

    There are fewer folds if most classes have fewer images, so that each fold has an image of each class. The folds of
    scikit-learn do not support this together with copies.

    Args:
        images: N images.
        seed: Seed of the order within a class.

    Returns:
        Number of the fold of each image, ``(N,)``.
    """
    _, groups = np.unique(images.digests, return_inverse=True)
    return deal_folds(images.labels, groups, seed)


def deal_folds(labels: Tensor, groups: NDArray[np.int64], seed: int = 0) -> Tensor:
    """Assign images to folds as :func:`folds_of` does; images of a group share a fold.

    Args:
        labels: Class ids ``(N,)``.
        groups: Number of the group of each image ``(N,)``, such as of its copies.
        seed: Seed of the order within a class.

    Returns:
        Number of the fold of each image, ``(N,)``.
    """
    # The first image of a group stands for the group.
    _, first, groups = np.unique(groups, return_index=True, return_inverse=True)
    ids = labels.numpy()[first]
    _, counts = np.unique(ids, return_counts=True)
    folds = int(np.clip(np.median(counts), 2, FOLDS))
    chance = np.random.default_rng(seed).random(len(first))
    dealt = np.empty(len(first), dtype=np.int64)
    dealt[np.lexsort((chance, ids))] = np.arange(len(first)) % folds
    return torch.from_numpy(dealt[groups])


def held_out_accuracy(classify: Classify, embedding: Tensor, labels: Tensor, folds: Tensor) -> Accuracy:
    """Return the accuracy of a classifier on each fold after training on the other folds.

    Args:
        classify: The classifier.
        embedding: ``(N, d)``.
        labels: Class ids ``(N,)``.
        folds: Number of the fold of each image ``(N,)``; see :func:`folds_of`.
    """
    right = torch.zeros(len(labels), dtype=torch.bool)
    for rest, held_out in _divisions(folds):
        if labels[rest].unique().numel() > 1:
            right[held_out] = classify(embedding[rest], labels[rest], embedding[held_out]) == labels[held_out]
    return Accuracy.of(right)


def _divisions(folds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for fold in folds.unique():
        yield (folds != fold).nonzero().flatten(), (folds == fold).nonzero().flatten()


def nearest_class_mean(train_embedding: Tensor, train_labels: Tensor, embedding: Tensor) -> Tensor:
    """Predict class ids ``(M,)`` by the nearest class mean of L2-normalised embeddings ``(N, d)`` and ``(M, d)``."""
    centers, classes = class_centers(unit_rows(train_embedding), train_labels)
    return classes[squared_distances(unit_rows(embedding), centers).argmin(1)]


def linear_probe(train_embedding: Tensor, train_labels: Tensor, embedding: Tensor) -> Tensor:
    """Predict class ids ``(M,)`` by logistic regression on L2-normalised embeddings, as ``--method linear_probe``."""
    return logistic_regression(train_embedding, train_labels, embedding)


def logme(embedding: Tensor, labels: Tensor) -> float:
    r"""Return LogME: the mean log evidence per image of a Bayesian linear model from the embedding to the labels.

    The indicator y of each class is modelled as :math:`y \sim N(F w, \beta^{-1} I)` with the prior
    :math:`w \sim N(0, \alpha^{-1} I)`. The precisions maximise the evidence
    :math:`\ln \int p(y | w, \beta) p(w | \alpha) \, dw`. The result is its mean over classes, divided by N. Higher is
    better; values compare embeddings of the same images only.

    References:
        You, Liu, Wang and Long, LogME: Practical Assessment of Pre-trained Models for Transfer Learning, ICML 2021.

    Args:
        embedding: ``(N, d)``.
        labels: Class ids ``(N,)``.
    """
    left, singular, _ = np.linalg.svd(embedding.double().numpy(), full_matrices=False)
    evidences = []
    for number in labels.unique().tolist():
        y = (labels == number).double().numpy()
        evidences.append(_evidence(singular**2, (left.T @ y) ** 2, float(y @ y), len(y)))
    return float(np.mean(evidences)) / len(labels)


def _evidence(squares: NDArray[Any], projected: NDArray[Any], total: float, n: int) -> float:
    r"""Maximise the log evidence.

    For a ratio :math:`r = \alpha / \beta` the best :math:`\beta` is known, and one variable remains. The paper iterates
    a fixed point instead, which divides by zero where the embedding explains every label.

    Args:
        squares: Squared singular values s of the embedding.
        projected: Squared products of the left singular vectors with y.
        total: Squared length of y.
        n: Number of images.
    """
    from scipy.optimize import minimize_scalar

    unexplained = max(0.0, total - projected.sum())

    def loss(log_ratio: float) -> float:
        ratio = math.exp(log_ratio)
        error = (projected * ratio / (squares + ratio)).sum() + unexplained
        return 0.5 * float(n * (1 + math.log(2 * math.pi * error / n)) + np.log1p(squares / ratio).sum())

    grid = math.log(squares.max() or 1.0) + np.linspace(-_LOGME_RANGE, _LOGME_RANGE, 47)
    best = float(min(grid, key=loss))
    step = float(grid[1] - grid[0])
    return -float(minimize_scalar(loss, bounds=(best - step, best + step), method="bounded").fun)


def smallest_within_one_error(sizes: Sequence[int], accuracies: Sequence[Accuracy]) -> int:
    """Return the smallest size whose accuracy is within one standard error of the best."""
    best = max(accuracies, key=lambda accuracy: accuracy.percent)
    enough = best.percent - best.standard_error
    return min(size for size, found in zip(sizes, accuracies, strict=True) if found.percent >= enough)
