r"""Label information: how much a teacher's embedding says about the student's labels, measured before training.

A teacher of other classes may separate the student's classes well or not at all. Here each training label is predicted
from the teacher's embedding of the *other* training images. The better the prediction, the more weight the teacher
should have. No held-out images and no student are needed.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import MethodError
from refilled.losses.distances import at_least_float32, class_centers, squared_distances, unit_rows
from refilled.losses.mining import check_batch
from refilled.stages import needs_training_set

_SHUFFLES = 19  # the labels beat all of them by chance once in 20 times, so the level is 5 %

_Z = 1.645  # one-sided test at the level of 5 %

_TEMPERATURES = tuple(0.02 * 2 ** (step / 2) for step in range(14))  # 0.02 to 1.8; squared distances are at most 4


def label_information(embedding: Tensor, labels: Tensor) -> float:
    r"""Return the share of the labels' entropy that the nearest-class-mean posterior of an embedding removes.

    An image that is the only one of its class is left out first, and that class is not counted. The mean of the other
    N images is subtracted from the embedding, and each row is scaled to length 1, which gives :math:`\phi(x)`. Let
    :math:`p_c^x` be the mean of :math:`\phi` over the images of class c except x. The posterior
    :math:`q_\tau(c|x) = \mathrm{softmax}_c(-\|\phi(x) - p_c^x\|^2 / \tau)` predicts the label of x from the other
    images. With C classes, the result is

    .. math:: \max\Big(0,\; \max_\tau \; 1 - \frac{-\frac{1}{N} \sum_x \ln q_\tau(y_x | x)}{\ln C}\Big)

    over 14 temperatures from 0.02 to 1.8, where one :math:`\tau` holds for all images. It is McFadden's
    pseudo-:math:`R^2` of leave-one-out predictions: 1 if every label is predicted with certainty, and 0 if the
    predictions are no better than the uniform distribution. The denominator is the entropy :math:`\ln C` of the uniform
    distribution, even if the classes have unequal sizes.

    Args:
        embedding: ``(N, d)``; half precision is converted to float32.
        labels: Class ids ``(N,)``, any integers.

    Returns:
        A number in [0, 1] without a unit; 0 if fewer than two classes have two or more images.

    Raises:
        MethodError: The shapes do not fit, or there are no images.
    """
    losses = _leave_one_out_losses(embedding, labels)
    if len(losses) == 0:
        return 0.0
    _, counts = labels.unique(return_counts=True)
    return _share(losses, int((counts > 1).sum()))


def held_out_information(embedding: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor) -> float:
    """Return the share of the entropy of held-out labels that the class means of the training images remove.

    The same as :func:`label_information`, but the predicted images are not in any class mean.

    Args:
        embedding: Of the training images, ``(N, d)``.
        labels: Their class ids ``(N,)``.
        held_out: Embedding of the held-out images, ``(M, d)``.
        held_out_labels: Their class ids ``(M,)``, each of which is one of ``labels``.

    Returns:
        In [0, 1].
    """
    check_batch(labels, embedding)
    check_batch(held_out_labels, held_out)
    embedding, held_out = (at_least_float32(part.detach()) for part in (embedding, held_out))
    mean = embedding.mean(0)
    means, classes = class_centers(unit_rows(embedding - mean), labels)
    targets = (held_out_labels[:, None] == classes).int().argmax(1)
    return _share(_best_losses(squared_distances(unit_rows(held_out - mean), means), targets), len(classes))


def knows_less(embedding: Tensor, other: Tensor, labels: Tensor) -> bool:
    """Return whether an embedding ``(N, d)`` says less about the labels ``(N,)`` than another embedding ``(N, e)``.

    This is a one-sided z test at the level of 5 %. It compares, image by image, the leave-one-out losses that
    :func:`label_information` averages.
    """
    excess = _leave_one_out_losses(embedding, labels) - _leave_one_out_losses(other, labels)
    if len(excess) == 0:
        return False
    return excess.mean().item() > _Z * excess.std().item() / math.sqrt(len(excess))


def _leave_one_out_losses(embedding: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image that is not the only one of its class; empty if there is one class."""
    check_batch(labels, embedding)
    _, labels, counts = labels.unique(return_inverse=True, return_counts=True)
    paired = counts[labels] > 1
    embedding, labels = at_least_float32(embedding.detach())[paired], labels[paired]
    if labels.unique().numel() < 2:
        return embedding.new_empty(0)
    rows = unit_rows(embedding - embedding.mean(0))
    means, classes = class_centers(rows, labels)
    own = labels[:, None] == classes
    n = own.sum(0, dtype=rows.dtype)
    # The distance from x to the mean without x is n / (n - 1) times that to the mean with x.
    squared = squared_distances(rows, means) * torch.where(own, (n / (n - 1)).square(), 1)
    return _best_losses(squared, own.int().argmax(1))


def _best_losses(squared: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each image, at the temperature with the lowest mean."""
    losses = [F.cross_entropy(-squared / temperature, targets, reduction="none") for temperature in _TEMPERATURES]
    return min(losses, key=lambda loss: loss.mean().item())


def _share(losses: Tensor, classes: int) -> float:
    return max(0.0, 1 - losses.mean().item() / math.log(classes))


def is_at_chance(information: Callable[[Tensor], float], labels: Tensor) -> bool:
    """Return whether an embedding says no more about the labels than about shuffled labels.

    This is a permutation test at the level of 5 %. The 19 shuffles are always the same.

    Args:
        information: Maps labels ``(N,)`` to a number, as :func:`label_information` with a given embedding does.
        labels: The labels ``(N,)``.
    """
    generator = torch.Generator().manual_seed(0)
    shuffled = (labels[torch.randperm(len(labels), generator=generator)] for _ in range(_SHUFFLES))
    return information(labels) <= max(information(order) for order in shuffled)


class Trusted(nn.Module):
    r"""A loss weighted by how much the teacher's embedding says about the labels.

    The value is that of the given loss times :math:`s^{power}`, where s is :func:`label_information` of the training
    set. With ``worth``, the teacher is a prior that is worth :math:`m = worth \cdot s / (1 - s)` labelled images per
    class, and the value is also multiplied by :math:`\min(1, m / n)` for n training images per class.

    Args:
        loss: A loss that is called with ``(student_tensor, teacher_tensor, labels)``.
        power: 0: every teacher has the same weight. A higher power reduces the weight of a weak teacher.
        worth: Number of labelled images per class that a teacher is worth if its embedding removes half of the labels'
            entropy. None: no limit.

    Raises:
        MethodError: The power is negative, ``worth`` is not above 0, or (on a call) :meth:`precompute` was not called.
    """

    share: Tensor
    prior: Tensor
    needs_training_set = True

    def __init__(self, loss: nn.Module, power: float = 1.0, worth: float | None = None) -> None:
        super().__init__()
        if not power >= 0:
            raise MethodError(f"trust must be 0 or more, but is {power}")
        if worth is not None and not worth > 0:
            raise MethodError(f"worth must be greater than 0, but is {worth}")
        self.loss = loss
        self.power = power
        self.worth = worth
        self.reads_labels = getattr(loss, "reads_labels", True)
        self.sees_unlabelled = getattr(loss, "sees_unlabelled", not self.reads_labels)
        self.register_buffer("share", torch.tensor(math.nan))
        if worth is not None:
            self.register_buffer("prior", torch.tensor(math.nan))
        self._share_is_known = False  # checked once, because the check waits for a GPU

    def precompute(self, teacher_embedding: Tensor, labels: Tensor) -> None:
        """Compute the label information of the training set ``(N, d)`` with class ids ``(N,)``.

        The given loss precomputes its own values from the same tensors; only it uses unlabelled images, with class id
        -1.
        """
        known = labels >= 0
        share = label_information(teacher_embedding[known], labels[known])
        self.share.fill_(share)
        if self.worth is not None:
            of_a_class = known.sum().item() / labels[known].unique().numel()
            self.prior.fill_(min(1.0, self.worth * share / max(1 - share, 1e-6) / of_a_class))
        if needs_training_set(self.loss):
            self.loss.precompute(teacher_embedding, labels)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss."""
        if not self._share_is_known and self.share.isnan():
            raise MethodError(
                "the teacher's label information is missing; call precompute(teacher_embedding, labels) first"
            )
        self._share_is_known = True
        loss: Tensor = self.loss(student, teacher, labels)
        weight = self.share**self.power
        return (weight if self.worth is None else weight * self.prior) * loss

    def statistics(self) -> Mapping[str, Tensor]:
        """Return the label information, and the factor from ``worth`` if it is set, for the log."""
        return {"label_information": self.share} | ({} if self.worth is None else {"prior": self.prior})
