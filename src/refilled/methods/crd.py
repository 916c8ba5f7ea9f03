r"""Contrastive transfer: the student's embedding of an image identifies the teacher's embedding of the same image.

References:
    Tian, Krishnan and Isola, Contrastive Representation Distillation, ICLR 2020.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import MethodError
from refilled.losses.distances import unit_rows
from refilled.losses.mining import check_batch
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, constant


def contrast(
    student: Tensor, teacher: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, temperature: float
) -> Tensor:
    r"""Return the cross-entropy of identifying an image's teacher embedding among those of other classes.

    .. math:: -\frac{1}{N} \sum_i \ln \frac{e^{s_i^\top t_i / \tau}}
              {e^{s_i^\top t_i / \tau} + \sum_{j: y_j \neq y_i} e^{s_i^\top b_j / \tau}}

    Args:
        student: :math:`s`, ``(N, d)``, rows of length 1.
        teacher: :math:`t` of the same images, ``(N, d)``, rows of length 1.
        labels: Their class ids ``(N,)``.
        bank: :math:`b`, ``(M, d)``, rows of length 1.
        bank_labels: Their class ids ``(M,)``.
        temperature: :math:`\tau`.
    """
    own = (student * teacher).sum(1, keepdim=True)  # (N, 1)
    others = (student @ bank.T).masked_fill(labels[:, None] == bank_labels, -torch.inf)  # (N, M)
    return F.cross_entropy(torch.cat([own, others], dim=1) / temperature, torch.zeros_like(labels))


class ContrastiveLoss(nn.Module):
    """:func:`contrast` of learned linear projections of student and teacher.

    The published loss draws negatives from a memory of past embeddings, contrasts both ways, and estimates the sum by
    noise-contrastive estimation. Here the frozen embeddings of all training images are available, so the sum is exact.

    Args:
        student_dim: d_S.
        teacher_dim: d_T.
        dim: Dimension of both projections; 128 in the paper.
        temperature: 0.07 in the paper.

    Raises:
        MethodError: The temperature is not positive, or (on a call) :meth:`precompute` was not called.
    """

    bank: Tensor
    bank_labels: Tensor
    needs_training_set = True

    def __init__(self, student_dim: int, teacher_dim: int, *, dim: int = 128, temperature: float = 0.07) -> None:
        super().__init__()
        if not temperature > 0:
            raise MethodError(f"temperature must be greater than 0, but is {temperature}")
        self.of_student = nn.Linear(student_dim, dim)
        self.of_teacher = nn.Linear(teacher_dim, dim)
        self.temperature = temperature
        self.register_buffer("bank", torch.empty(0, teacher_dim))
        self.register_buffer("bank_labels", torch.empty(0, dtype=torch.long))

    def precompute(self, teacher_embedding: Tensor, labels: Tensor) -> None:
        """Store the embeddings ``(M, d_T)`` and class ids ``(M,)`` of the training set, to contrast with."""
        self.bank, self.bank_labels = teacher_embedding.float(), labels

    def forward(self, student_embedding: Tensor, teacher_embedding: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of embeddings ``(N, d_S)`` and ``(N, d_T)`` with class ids ``(N,)``."""
        check_batch(labels, student_embedding, teacher_embedding)
        if len(self.bank) == 0:
            raise MethodError(
                "there are no embeddings to contrast with; call precompute(teacher_embedding, labels) first"
            )
        with torch.autocast(labels.device.type, enabled=False):
            student = unit_rows(self.of_student(student_embedding.float()))
            teacher = unit_rows(self.of_teacher(teacher_embedding.detach().float()))
            bank = unit_rows(self.of_teacher(self.bank))
            return contrast(student, teacher, labels, bank, self.bank_labels, self.temperature)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("bank", "bank_labels"):  # the number of images is known only from the loaded state
            if (saved := state_dict.get(f"{prefix}{name}")) is not None:
                setattr(self, name, torch.empty_like(saved, device=self.bank.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def crd(student: ModelShape, teacher: ModelShape, *, weight: float = 0.8, temperature: float = 0.07) -> list[Stage]:
    """Identify each image's teacher embedding by contrast, added to cross-entropy (Tian et al., ICLR 2020).

    Args:
        student: The student.
        teacher: The teacher; its classes may be any.
        weight: Factor of the loss; 0.8 in the paper.
        temperature: tau.
    """
    loss = ContrastiveLoss(student.embedding_dim, teacher.embedding_dim, temperature=temperature)
    terms = {
        "ce": Term(nn.CrossEntropyLoss()),
        "contrast": Term(loss, constant(weight), student="embedding", teacher="embedding"),
    }
    return [Stage("classifier", terms)]
