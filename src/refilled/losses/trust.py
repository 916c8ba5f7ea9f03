r"""How far to trust a teacher: by what its embedding says about the labels at hand, measured before training.

A teacher of other classes may know much about the student's, or next to nothing. The training labels tell: they are
guessed from the teacher's embedding of the *other* training images, and the better the guess, the more weight what the
teacher says should have. No held-out images are needed, and no student.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import MethodError
from refilled.losses.distances import at_least_float32, class_centers, squared_distances, unit_rows
from refilled.losses.mining import check_batch
from refilled.stages import Prepares

_SHUFFLES = 19  # of which none is better, at chance, once in 20 times

_Z = 1.645  # one-sided test at the level of 5 %

_TEMPERATURES = tuple(0.02 * 2 ** (step / 2) for step in range(14))  # 0.02 to 1.8, of squared distances up to 4


def label_information(embedding: Tensor, labels: Tensor) -> float:
    r"""Share of the labels' entropy that the nearest-class-mean posterior of an embedding takes away.

    The embedding is centred and brought to length 1; each image is compared with the class means of all other images,
    :math:`q(c|x) = \mathrm{softmax}_c(-\|\phi(x) - p_c\|^2 / \tau)`, at the temperature that suits it best:

    .. math:: \max_\tau \; 1 - \frac{\frac{1}{N} \sum_x -\ln q(y_x | x)}{\ln C}

    This is McFadden's pseudo-:math:`R^2` with leave-one-out predictions: 1 for an embedding that separates the
    classes, 0 for one that knows nothing of them.

    Args:
        embedding: ``(N, d)``.
        labels: Class ids ``(N,)``. Images that are the only ones of their class are left out.

    Returns:
        In [0, 1]; 0 where there are fewer than two classes with two images each.
    """
    losses = _leave_one_out_losses(embedding, labels)
    if len(losses) == 0:
        return 0.0
    _, counts = labels.unique(return_counts=True)
    return _share(losses, int((counts > 1).sum()))


def held_out_information(embedding: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor) -> float:
    """Share of the entropy of held-out images' labels that the class means of the training images take away.

    As :func:`label_information`, but of images whose labels were not looked at.

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
    """Whether an embedding ``(N, d)`` says less about the labels ``(N,)`` than another embedding ``(N, e)`` does.

    It is a one-sided z test at the level of 5 % of the difference, image by image, of the leave-one-out losses that
    :func:`label_information` averages.
    """
    excess = _leave_one_out_losses(embedding, labels) - _leave_one_out_losses(other, labels)
    if len(excess) == 0:
        return False
    return excess.mean().item() > _Z * excess.std().item() / math.sqrt(len(excess))


def _leave_one_out_losses(embedding: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image that is not the only one of its class; none if there is one class."""
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
    # The mean without x lies n / (n - 1) times as far from x as the mean with it.
    squared = squared_distances(rows, means) * torch.where(own, (n / (n - 1)).square(), 1)
    return _best_losses(squared, own.int().argmax(1))


def _best_losses(squared: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each image at the temperature that suits all of them best."""
    losses = [F.cross_entropy(-squared / temperature, targets, reduction="none") for temperature in _TEMPERATURES]
    return min(losses, key=lambda loss: loss.mean().item())


def _share(losses: Tensor, classes: int) -> float:
    return max(0.0, 1 - losses.mean().item() / math.log(classes))


def is_at_chance(information: Callable[[Tensor], float], labels: Tensor) -> bool:
    """Whether what is known of the labels ``(N,)`` is no more than what is known of shuffled ones.

    It is a permutation test at the level of 5 %, always with the same 19 shuffles.

    Args:
        information: Returns how much is known of labels ``(N,)``, as :func:`label_information` of an embedding does.
        labels: The labels.
    """
    generator = torch.Generator().manual_seed(0)
    shuffled = (labels[torch.randperm(len(labels), generator=generator)] for _ in range(_SHUFFLES))
    return information(labels) <= max(information(order) for order in shuffled)


class Trusted(nn.Module):
    r"""A loss weighted by how much the teacher's embedding says about the labels.

    It is the given loss times :math:`s^{power}`, where s is :func:`label_information` of the training set. With
    ``worth``, the teacher also acts as a prior worth :math:`worth \cdot s / (1 - s)` labelled images per class: with
    n images per class, if n is larger, its weight falls as :math:`1 / n`.

    Args:
        loss: A loss that is called with ``(student_tensor, teacher_tensor, labels)``.
        power: 0: every teacher has the same weight. A higher power reduces the weight of a weak teacher.
        worth: Number of labelled images per class that a teacher is worth if its embedding removes half of the labels'
            entropy. None: no limit.

    Raises:
        MethodError: the power is negative, ``worth`` is not above 0, or (on a call) :meth:`prepare` was not called.
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
        self._share_is_known = False  # asked once: a GPU would be waited for

    def prepare(self, teacher_embedding: Tensor, labels: Tensor) -> None:
        """Measure the teacher by the training set ``(N, d)`` with class ids ``(N,)``; the loss may look at it too.

        Images without labels, of class id -1, are for the loss alone.
        """
        known = labels >= 0
        share = label_information(teacher_embedding[known], labels[known])
        self.share.fill_(share)
        if self.worth is not None:
            of_a_class = known.sum().item() / labels[known].unique().numel()
            self.prior.fill_(min(1.0, self.worth * share / max(1 - share, 1e-6) / of_a_class))
        if isinstance(self.loss, Prepares) and self.loss.needs_training_set:
            self.loss.prepare(teacher_embedding, labels)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss."""
        if not self._share_is_known and self.share.isnan():
            raise MethodError("how far to trust the teacher is not known yet; call prepare(teacher_embedding, labels)")
        self._share_is_known = True
        loss: Tensor = self.loss(student, teacher, labels)
        weight = self.share**self.power
        return (weight if self.worth is None else weight * self.prior) * loss

    def statistics(self) -> Mapping[str, Tensor]:
        """Return the share, and what the number of images leaves of it, for the log."""
        return {"label_information": self.share} | ({} if self.worth is None else {"prior": self.prior})
