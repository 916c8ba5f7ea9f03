r"""Relational knowledge distillation: match distances between images and angles in triples of images.

References:
    Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.losses.distances import at_least_float32, pairwise_distances
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, constant


def relative_distances(embedding: Tensor) -> Tensor:
    """Return all pairwise distances divided by the mean of those above 0: ``(N, d) -> (N, N)``."""
    distances = pairwise_distances(embedding)
    apart = distances > 0
    mean = (distances * apart).sum() / apart.sum().clamp(min=1)
    return distances / mean.clamp(min=torch.finfo(distances.dtype).tiny)


def angles(embedding: Tensor) -> Tensor:
    r"""Return the cosines of the angles at vertex j between i and k: ``(N, d) -> (N, N, N)``, indexed j, i, k.

    .. math:: \cos\angle_{ijk} = \frac{(x_i - x_j)^\top(x_k - x_j)}{\|x_i - x_j\|\,\|x_k - x_j\|}

    The numerator is computed from inner products, without an ``(N, N, d)`` tensor of differences.
    An image that coincides with the vertex has no direction; its cosine is 0.
    """
    embedding = at_least_float32(embedding)
    centered = embedding - embedding.mean(0)  # the same differences, with smaller rounding errors
    products = centered @ centered.T  # (N, N)
    norms = products.diagonal()
    directions = products - products[:, :, None] - products[:, None, :] + norms[:, None, None]  # (j, i, k)
    distances = pairwise_distances(embedding)
    inverse = torch.where(distances > 0, distances, torch.inf).reciprocal()
    return directions * inverse[:, :, None] * inverse[:, None, :]


class RKDDistanceLoss(nn.Module):
    """Huber loss between the relative distances of student and teacher (Park et al., Eq. 5 and 6)."""

    reads_labels = False

    def forward(self, student_embedding: Tensor, teacher_embedding: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of embeddings ``(N, d_S)`` and ``(N, d_T)``; the labels are not used."""
        with torch.no_grad():
            target = relative_distances(teacher_embedding)
        return F.smooth_l1_loss(relative_distances(student_embedding), target.to(student_embedding.dtype))


class RKDAngleLoss(nn.Module):
    """Huber loss between the angles of student and teacher (Park et al., Eq. 8 and 9)."""

    reads_labels = False

    def forward(self, student_embedding: Tensor, teacher_embedding: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of embeddings ``(N, d_S)`` and ``(N, d_T)``; the labels are not used."""
        with torch.no_grad():
            target = angles(teacher_embedding)
        return F.smooth_l1_loss(angles(student_embedding), target.to(student_embedding.dtype))


def rkd(
    student: ModelShape,
    teacher: ModelShape,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    embedding_share: float = 0.5,
    joint: bool = False,
) -> list[Stage]:
    """Match distances and angles, then fine-tune with cross-entropy (Park et al., CVPR 2019).

    Args:
        student: The student.
        teacher: The teacher; its classes may be any.
        distance_weight: Factor of the distance loss.
        angle_weight: Factor of the angle loss.
        embedding_share: Share of the epochs used for the first of two stages. The ReFilled paper trains in two stages
            across tasks (supplement 2.1).
        joint: Train in one stage instead, with cross-entropy, as published comparisons on the same task do (Tian et
            al., ICLR 2020).
    """
    relations = {
        "distance": Term(RKDDistanceLoss(), constant(distance_weight), student="embedding", teacher="embedding"),
        "angle": Term(RKDAngleLoss(), constant(angle_weight), student="embedding", teacher="embedding"),
    }
    classify = {"ce": Term(nn.CrossEntropyLoss())}
    if joint:
        return [Stage("classifier", classify | relations)]
    return [
        Stage("embedding", relations, share=embedding_share),
        Stage("classifier", classify, share=1 - embedding_share, classifier="fresh"),
    ]
