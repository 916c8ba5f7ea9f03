"""Feature distillation: a linear projection of the student's pooled features matches the teacher's.

Timm's training script does this with ``--kd-distill-type feature``.

References:
    Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015 (the idea, on feature maps);
    Wightman, PyTorch Image Models, ``timm/task/distillation.py`` (pooled features, the mean squared error).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from refilled.losses.distances import at_least_float32
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, constant


class FeatureMSELoss(nn.Module):
    r"""Mean squared error of the projected student embedding: :math:`\frac{1}{N d_T} \sum_x \|P\phi_S - \phi_T\|^2`.

    Args:
        student_dim: d_S.
        teacher_dim: d_T. If both are equal, there is no projection.
    """

    reads_labels = False

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        same = student_dim == teacher_dim
        self.projector = nn.Identity() if same else nn.Linear(student_dim, teacher_dim)

    def forward(self, student_embedding: Tensor, teacher_embedding: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of embeddings ``(N, d_S)`` and ``(N, d_T)``; the labels are not used."""
        student = at_least_float32(student_embedding)
        if isinstance(self.projector, nn.Linear):
            student = self.projector(student.to(self.projector.weight.dtype))
        return F.mse_loss(student, at_least_float32(teacher_embedding.detach()).to(student.dtype))


def feature_mse(
    student: ModelShape, teacher: ModelShape, *, ce_weight: float = 1.0, weight: float = 5.0
) -> list[Stage]:
    """Match the teacher's pooled features by squared error, added to cross-entropy (timm's training script).

    Args:
        student: The student.
        teacher: The teacher; its classes may be any.
        ce_weight: Weight of cross-entropy.
        weight: Weight of the squared error.
    """
    loss = FeatureMSELoss(student.embedding_dim, teacher.embedding_dim)
    terms = {
        "ce": Term(nn.CrossEntropyLoss(), constant(ce_weight)),
        "features": Term(loss, constant(weight), student="embedding", teacher="embedding"),
    }
    return [Stage("classifier", terms)]
