r"""Cross-entropy for classes of unequal size.

Cross-entropy fits the frequencies of the training images, so that rare classes are rarely predicted. Two remedies:

* ``weights``: the loss of an image is multiplied by :math:`N / (C\,n_y)`, where :math:`n_y` is the number of training
  images of its class, :math:`N` the number of all and :math:`C` the number of classes. The mean weight is 1.
* ``logits``: :math:`\log(n_c / N)` is added to the logits in training and not in prediction. The classifier then fits
  what distinguishes the classes beyond their frequencies (Menon et al., "Long-tail learning via logit adjustment",
  ICLR 2021, equation 10 with tau = 1).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import MethodError


class BalancedCrossEntropyLoss(nn.Module):
    """Cross-entropy that gives each class the same importance, however many training images it has.

    Args:
        counts: Number of training images of each class ``(C,)``. A class without images counts as if it had one.
        balance: ``weights`` or ``logits``.

    Raises:
        MethodError: ``balance`` is neither of them.
    """

    counts: Tensor

    def __init__(self, counts: Tensor, balance: Literal["weights", "logits"] = "logits") -> None:
        super().__init__()
        if balance not in ("weights", "logits"):
            raise MethodError(f"balance = '{balance}' is unknown; give 'weights' or 'logits'")
        self.balance = balance
        self.register_buffer("counts", counts.double().clamp(min=1), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss.

        Args:
            logits: The student's logits ``(N, C)``.
            labels: Class ids ``(N,)``.
        """
        shares = self.counts / self.counts.sum()
        if self.balance == "logits":
            return F.cross_entropy(logits + shares.log().to(logits.dtype), labels)
        weights = 1 / (len(shares) * shares)
        return (weights[labels].to(logits.dtype) * F.cross_entropy(logits, labels, reduction="none")).mean()


def counts_of(labels: Tensor, classes: int) -> Tensor:
    """Return the number of images of each class ``(C,)``; labels of -1 are not counted."""
    return torch.bincount(labels[labels >= 0], minlength=classes)
