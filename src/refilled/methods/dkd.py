r"""Decoupled knowledge distillation: separate terms for the target class and for the other classes.

References:
    Zhao et al., Decoupled Knowledge Distillation, CVPR 2022.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.losses.distances import at_least_float32
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, warm_up


def decoupled_kl(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    r"""Return divergences of the softened probabilities with the target class t and without it, batch means.

    With :math:`p = \mathrm{softmax}(z / T)`, :math:`b = (p_t, 1 - p_t)` and :math:`\hat p` the softmax over only
    the other classes,

    .. math:: T^2\,\mathrm{KL}(b_T \,\|\, b_S), \qquad T^2\,\mathrm{KL}(\hat p_T \,\|\, \hat p_S)

    Args:
        student_logits: ``(N, C)``.
        teacher_logits: ``(N, C)``, of the same classes in the same order.
        labels: Class ids ``(N,)``.
        temperature: T.

    Returns:
        Two scalars, for the target class and for the other classes.
    """
    target_s, others_s = _decouple(student_logits / temperature, labels)
    target_t, others_t = _decouple(teacher_logits.detach() / temperature, labels)
    target = F.kl_div(target_s, target_t, reduction="batchmean", log_target=True)
    others = F.kl_div(others_s, others_t, reduction="batchmean", log_target=True)
    return temperature**2 * target, temperature**2 * others


def _decouple(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities ``(N, 2)`` of target and rest, and ``(N, C - 1)`` within the other classes."""
    logits = at_least_float32(logits)
    is_target = F.one_hot(labels, logits.shape[1]).bool()
    others = logits[~is_target].view(len(logits), -1)
    rest = others.logsumexp(1)  # log(1 - p) would lose all digits when the model is sure
    return torch.stack([logits[is_target], rest], 1).log_softmax(1), others.log_softmax(1)


class DKDLoss(nn.Module):
    r""":math:`\alpha` times the first and :math:`\beta` times the second of :func:`decoupled_kl`."""

    def __init__(self, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0) -> None:
        super().__init__()
        self.temperature, self.alpha, self.beta = temperature, alpha, beta

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of ``(N, C)`` logits with class ids ``(N,)``."""
        target, others = decoupled_kl(student_logits, teacher_logits, labels, self.temperature)
        return self.alpha * target + self.beta * others


def dkd(
    student: ModelShape,
    teacher: ModelShape,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    warmup_epochs: int = 20,
) -> list[Stage]:
    """Match target and other classes separately; needs a teacher of the same classes (Zhao et al., CVPR 2022).

    Args:
        student: The student.
        teacher: The teacher, of the same classes.
        temperature: T.
        alpha: Weight of the target class against the rest.
        beta: Weight of the term within the other classes. The authors choose it per teacher, from 1 to 10.
        warmup_epochs: Epochs over which the weight of distillation rises to 1. The authors' 20 are for 240 epochs.
    """
    terms = {
        "ce": Term(nn.CrossEntropyLoss()),
        "dkd": Term(DKDLoss(temperature, alpha, beta), warm_up(1.0, warmup_epochs), teacher="logits"),
    }
    return [Stage("classifier", terms)]
