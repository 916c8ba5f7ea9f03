"""Self-training: the student's confident predictions are the labels of unlabelled images. It needs no teacher.

References:
    Lee, Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method, ICML 2013 workshop (the weight rises);
    Sohn et al., FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence, NeurIPS 2020 (the
    threshold).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import MethodError
from refilled.losses.distances import at_least_float32
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, Weight


class PseudoLabelLoss(nn.Module):
    r"""Cross-entropy of unlabelled images with the student's own confident predictions.

    .. math:: \frac{1}{M} \sum_x [\max_c p(c|x) \ge t] \, \big(-\ln p(\hat y_x|x)\big), \quad
              \hat y_x = \arg\max_c p(c|x)

    over the M unlabelled images (class id -1); 0 if there are none.

    Args:
        threshold: t, in [0, 1].
    """

    sees_unlabelled = True

    def __init__(self, threshold: float = 0.95) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise MethodError(f"threshold must be between 0 and 1, but is {threshold}")
        self.threshold = threshold
        self._taken = torch.zeros(())

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of logits ``(N, C)`` and class ids ``(N,)``."""
        unlabelled = labels < 0
        log_p = F.log_softmax(at_least_float32(logits), dim=1)
        sure, guess = log_p.detach().exp().max(1)
        taken = unlabelled & (sure >= self.threshold)
        number = unlabelled.sum().clamp(min=1)
        self._taken = taken.sum() / number
        return torch.where(taken, F.nll_loss(log_p, guess, reduction="none"), 0).sum() / number

    def statistics(self) -> Mapping[str, Tensor]:
        """Return the share of unlabelled images with a confident prediction in the last batch, for the log."""
        return {"pseudo_labelled": self._taken}


def self_training(
    student: ModelShape,
    teacher: None,
    *,
    threshold: float = 0.95,
    weight: float = 1.0,
    start: int = 10,
    rise: int = 10,
) -> list[Stage]:
    """Learn from the student's confident predictions for unlabelled images (Lee, 2013; FixMatch, 2020); no teacher.

    Args:
        student: The student.
        teacher: Not used.
        threshold: Smallest probability of a prediction that is used.
        weight: Weight of the predictions.
        start: Epochs before predictions are used.
        rise: Epochs after that over which the weight rises.
    """
    guesses = Term(PseudoLabelLoss(threshold), _ramp(weight, start, rise))
    return [Stage("classifier", {"ce": Term(nn.CrossEntropyLoss()), "guesses": guesses})]


def _ramp(weight: float, start: int, rise: int) -> Weight:
    return lambda epoch: weight * min(1.0, max(0.0, (epoch + 1 - start) / max(rise, 1)))
