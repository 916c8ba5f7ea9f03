r"""Attention transfer: the student matches the spatial attention of the teacher.

References:
    Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017 (Eq. 2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.losses.distances import unit_rows
from refilled.losses.feature_maps import check_feature_maps, paired_maps
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, constant


def attention(maps: Tensor) -> Tensor:
    r"""Return the energy at each position, scaled to length 1 per image: ``(N, C, H, W) -> (N, H * W)``.

    .. math:: q = Q / \|Q\|_2, \qquad Q = \tfrac{1}{C} \sum_c A_c^2
    """
    return unit_rows(maps.square().mean(1).flatten(1))


class AttentionLoss(nn.Module):
    r"""Squared difference of attention, averaged over images and positions and summed over the pairs of maps.

    .. math:: \sum_l \operatorname{mean}\,\big(q_S^l - q_T^l\big)^2

    This is what the authors' code computes, and the weight of 1000 is meant for it. Their paper has the length of the
    difference instead, which is neither squared nor divided by the number of positions.
    """

    reads_labels = False

    def forward(
        self, student_features: tuple[Tensor, ...], teacher_features: tuple[Tensor, ...], labels: Tensor
    ) -> Tensor:
        """Return the scalar loss of maps ``(N, C_l, H_l, W_l)``, shallow to deep; the labels are not used."""
        pairs = paired_maps(student_features, teacher_features)
        return torch.stack([F.mse_loss(attention(seen), attention(taught)) for seen, taught in pairs]).sum()


def at(student: ModelShape, teacher: ModelShape, *, weight: float = 1000.0) -> list[Stage]:
    """Match the spatial attention of feature maps, added to cross-entropy (Zagoruyko and Komodakis, ICLR 2017).

    Args:
        student: The student, with feature maps.
        teacher: The teacher, with feature maps; its classes may be any.
        weight: Factor of the attention loss; 1000 in the authors' code.
    """
    check_feature_maps(student, teacher)
    terms = {
        "ce": Term(nn.CrossEntropyLoss()),
        "attention": Term(AttentionLoss(), constant(weight), student="features", teacher="features"),
    }
    return [Stage("classifier", terms)]
