r"""Embedding regression: a learned projection of the student's embedding has the direction of the teacher's.

References:
    Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015 (matching through a learned map);
    Chen et al., Improved Feature Distillation via Projector Ensemble, NeurIPS 2022 (a linear projector and the cosine).
"""

import torch
from torch import Tensor, nn

from refilled.losses.distances import at_least_float32, unit_rows
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, constant


def misalignment(projected: Tensor, target: Tensor) -> Tensor:
    r"""Return one minus the cosine between projected and target directions, averaged over the batch.

    .. math:: \frac{1}{N} \sum_x 1 - \frac{P\phi_S(x)^\top t(x)}{\|P\phi_S(x)\|\,\|t(x)\|}

    Args:
        projected: :math:`P\phi_S(x)`, ``(N, d)``.
        target: ``(N, d)``. A zero row has no direction; its term is 1.
    """
    return (1 - (unit_rows(projected) * unit_rows(target)).sum(1)).mean()


class EmbeddingRegressionLoss(nn.Module):
    """:func:`misalignment` with the teacher's centred embedding, through a learned linear projector.

    A large part of a teacher's embedding is often one direction that all images share, because it is positive after a
    ReLU. This direction does not distinguish images, so the mean over the training set is subtracted.

    Args:
        student_dim: d_S.
        teacher_dim: d_T.
    """

    mean: Tensor
    needs_training_set = True
    reads_labels = False

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.projector = nn.Linear(student_dim, teacher_dim)
        self.register_buffer("mean", torch.zeros(teacher_dim))

    def precompute(self, teacher_embedding: Tensor, labels: Tensor) -> None:
        """Compute the mean of the training set's embeddings ``(N, d_T)``; the initial mean is 0."""
        self.mean.copy_(teacher_embedding.mean(0))

    def forward(self, student_embedding: Tensor, teacher_embedding: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of embeddings ``(N, d_S)`` and ``(N, d_T)``; the labels are not used."""
        student = at_least_float32(student_embedding).to(self.projector.weight.dtype)
        return misalignment(self.projector(student), teacher_embedding.detach() - self.mean)


def regression(student: ModelShape, teacher: ModelShape, *, weight: float = 10.0) -> list[Stage]:
    """Match the direction of the teacher's embedding through a learned projector, added to cross-entropy.

    Args:
        student: The student.
        teacher: The teacher; its classes may be any.
        weight: Factor of the regression.
    """
    loss = EmbeddingRegressionLoss(student.embedding_dim, teacher.embedding_dim)
    terms = {
        "ce": Term(nn.CrossEntropyLoss()),
        "regression": Term(loss, constant(weight), student="embedding", teacher="embedding"),
    }
    return [Stage("classifier", terms)]
