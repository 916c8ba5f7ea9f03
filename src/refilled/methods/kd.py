"""Knowledge distillation: the student matches the teacher's softened class probabilities.

References:
    Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015;
    Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024 (``standardize``).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from refilled.losses.distances import unit_rows
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, constant


def softened_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    r"""Return the divergence of softened class probabilities, averaged over the batch.

    .. math:: T^2\,\mathrm{KL}\big(\mathrm{softmax}(z_T / T)\,\|\,\mathrm{softmax}(z_S / T)\big)

    Args:
        student_logits: ``(N, C)``.
        teacher_logits: ``(N, C)``, of the same classes in the same order.
        temperature: T. The factor of T² keeps the size of the gradient as T grows.
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def standardized(logits: Tensor) -> Tensor:
    r"""Standardize the logits ``(N, C)`` of each image to mean 0 and standard deviation 1 (Sun et al.).

    .. math:: z \mapsto (z - \bar z) / \sigma(z)

    Logits that are all equal have no deviation and become 0.
    """
    deviations = logits - logits.mean(1, keepdim=True)
    unbiased: float = (logits.shape[1] - 1) ** 0.5
    return unbiased * unit_rows(deviations)


class KDLoss(nn.Module):
    """:func:`softened_kl` with its temperature, of :func:`standardized` or unchanged logits."""

    reads_labels = False

    def __init__(self, temperature: float = 4.0, standardize: bool = False) -> None:
        super().__init__()
        self.temperature, self.standardize = temperature, standardize

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of ``(N, C)`` logits; the labels are not used."""
        if self.standardize:
            student_logits, teacher_logits = standardized(student_logits), standardized(teacher_logits)
        return softened_kl(student_logits, teacher_logits, self.temperature)


def kd(
    student: ModelShape,
    teacher: ModelShape,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    standardize: bool = False,
) -> list[Stage]:
    """Match the teacher's softened logits; needs a teacher of the same classes (Hinton et al., 2015).

    Args:
        student: The student.
        teacher: The teacher, of the same classes.
        temperature: T.
        ce_weight: Weight of cross-entropy.
        kd_weight: Weight of distillation.
        standardize: Whether logits are standardized, so that the student need not match their mean and spread
            (Sun et al., CVPR 2024, who use ``temperature`` 2 and ``kd_weight`` 9).
    """
    terms = {
        "ce": Term(nn.CrossEntropyLoss(), constant(ce_weight)),
        "kd": Term(KDLoss(temperature, standardize), constant(kd_weight), teacher="logits"),
    }
    return [Stage("classifier", terms)]
