"""Measures of predictions: plain tensors in, numbers out."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reliability:
    """Confidence and accuracy in equally wide bins of confidence.

    Attributes:
        counts: Images per bin ``(B,)``.
        confidence: Mean probability of the predicted class per bin ``(B,)``; 0 in an empty bin.
        accuracy: Share of right predictions per bin ``(B,)``; 0 in an empty bin.
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1]: the mean gap of accuracy and confidence, weighted by images.

        References: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
        """
        gaps = (self.accuracy - self.confidence).abs() * self.counts
        return float(gaps.sum() / self.counts.sum())


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Sort predictions by confidence into bins ``(k/B, (k+1)/B]``.

    Args:
        probabilities: ``(N, C)``.
        labels: ``(N,)``.
        bins: Number of bins B.
    """
    confidence, found = probabilities.double().max(1)
    places = (torch.ceil(confidence * bins) - 1).long().clamp(0, bins - 1)
    counts = torch.bincount(places, minlength=bins).double()
    right = (found == labels).double()
    sums = [torch.zeros(bins, dtype=torch.float64).index_add_(0, places, values) for values in (confidence, right)]
    return Reliability(counts, *(total / counts.clamp(min=1) for total in sums))


def confusion_matrix(found: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count predictions ``(N,)`` by true class (row) and predicted class (column), to ``(C, C)``."""
    return torch.bincount(labels * classes + found, minlength=classes * classes).reshape(classes, classes)


def most_confused(confusion: Tensor, count: int) -> list[tuple[int, int, int]]:
    """Return the pairs (true class, predicted class, images) of a confusion matrix ``(C, C)`` with most errors."""
    errors = confusion - confusion.diag().diag()
    order = errors.flatten().argsort(descending=True, stable=True)[:count].tolist()
    pairs = [(*divmod(place, len(errors)), int(errors.flatten()[place])) for place in order]
    return [pair for pair in pairs if pair[2] > 0]


def top_accuracy(probabilities: Tensor, labels: Tensor, k: int = 5) -> float:
    """Return the share in percent of images whose class is among the ``k`` most probable."""
    highest = probabilities.topk(k, 1).indices
    return 100 * float((highest == labels[:, None]).any(1).double().mean())
