r"""Decoupled knowledge distillation: the target class against the rest, and the rest among themselves.

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
    r"""Divergences of the softened probabilities, with the target class t and without it; means over the batch.

    With :math:`p = \mathrm{softmax}(z / T)`, :math:`b = (p_t, 1 - p_t)` and :math:`\hat p` the softmax over the other
    classes alone,

    .. math:: T^2\,\mathrm{KL}(b_T \,\|\, b_S), \qquad T^2\,\mathrm{KL}(\hat p_T \,\|\, \hat p_S)

    Args:
        student_logits: ``(N, C)``.
        teacher_logits: ``(N, C)``, of the same classes in the same order.
        labels: Class ids ``(N,)``.
        temperature: T.

    Returns:
        Two scalars: of the target class, and of the other classes.
    """
    target_s, others_s = _decouple(student_logits / temperature, labels)
    target_t, others_t = _decouple(teacher_logits.detach() / temperature, labels)
    target = F.kl_div(target_s, target_t, reduction="batchmean", log_target=True)
    others = F.kl_div(others_s, others_t, reduction="batchmean", log_target=True)
    return temperature**2 * target, temperature**2 * others


def _decouple(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities ``(N, 2)`` of target and rest, and ``(N, C - 1)`` of the others among themselves."""
    logits = at_least_float32(logits)
    is_target = F.one_hot(labels, logits.shape[1]).bool()
    others = logits[~is_target].view(len(logits), -1)
    rest = others.logsumexp(1)  # and not log(1 - p), which loses all digits when the model is sure
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
    """Match the target's and the other classes' probabilities apart; same classes (Zhao et al., CVPR 2022).

    Args:
        student: The student.
        teacher: The teacher, of the same classes.
        temperature: T.
        alpha: Weight of the target class against the rest.
        beta: Weight of the other classes among themselves; the authors vary it with the teacher, from 1 to 10.
        warmup_epochs: Epochs in which the weight of distillation rises to 1; the authors' 20 are meant for 240.
    """
    terms = {
        "ce": Term(nn.CrossEntropyLoss()),
        "dkd": Term(DKDLoss(temperature, alpha, beta), warm_up(1.0, warmup_epochs), teacher="logits"),
    }
    return [Stage("classifier", terms)]
