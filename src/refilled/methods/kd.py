"""Knowledge distillation: the student matches the teacher's softened class probabilities.

References:
    Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, constant


def softened_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    r"""Divergence of softened class probabilities, a mean over the batch.

    .. math:: T^2\,\mathrm{KL}\big(\mathrm{softmax}(z_T / T)\,\|\,\mathrm{softmax}(z_S / T)\big)

    Args:
        student_logits: ``(N, C)``.
        teacher_logits: ``(N, C)``, of the same classes in the same order.
        temperature: T; its square keeps the size of the gradient as T grows.
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class KDLoss(nn.Module):
    """:func:`softened_kl` with its temperature."""

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of ``(N, C)`` logits; the labels are not used."""
        return softened_kl(student_logits, teacher_logits, self.temperature)


def kd(
    student: ModelShape,
    teacher: ModelShape,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
) -> list[Stage]:
    """Match the teacher's softened logits; needs a teacher of the same classes (Hinton et al., 2015)."""
    terms = {
        "ce": Term(nn.CrossEntropyLoss(), constant(ce_weight)),
        "kd": Term(KDLoss(temperature), constant(kd_weight), teacher="logits"),
    }
    return [Stage("classifier", terms)]
