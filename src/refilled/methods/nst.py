r"""Neuron selectivity transfer: match the distributions of the channels' activation patterns.

References:
    Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.losses.distances import at_least_float32
from refilled.losses.feature_maps import check_feature_maps, paired_maps
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, constant


def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    r"""Return the mean of :math:`k(x, y) = (x^\top y)^2` over pairs of channels: ``(N, A, P), (N, B, P) -> (N,)``.

    The pairs are summed without a tensor of ``(N, A, B, P)``, through the smaller of two products: channels with
    channels or, since :math:`\sum_{ij} (a_i^\top b_j)^2 = \langle A^\top A, B^\top B \rangle`, positions with
    positions.
    """
    channels, places = a.shape[1] * b.shape[1], a.shape[2]
    with torch.autocast(a.device.type, enabled=False):  # the loss is a small difference of these means
        by_places = places**2 < channels
        products = (a.mT @ a) * (b.mT @ b) if by_places else (a @ b.mT).square()
    return products.sum((1, 2)) / channels


def squared_discrepancy(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Return the squared maximum mean discrepancy between the channels of two maps, averaged over images.

    .. math:: \mathbb{E}\,k(t, t') + \mathbb{E}\,k(s, s') - 2\,\mathbb{E}\,k(s, t), \qquad k(x, y) = (x^\top y)^2

    Args:
        student: ``(N, C_S, H, W)``; each channel is scaled to length 1 over its positions.
        teacher: ``(N, C_T, H, W)``.
    """
    s, t = (F.normalize(at_least_float32(maps).flatten(2), dim=2) for maps in (student, teacher))
    return (mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t)).mean()


class NeuronSelectivityLoss(nn.Module):
    """:func:`squared_discrepancy`, summed over the pairs of maps."""

    reads_labels = False

    def forward(
        self, student_features: tuple[Tensor, ...], teacher_features: tuple[Tensor, ...], labels: Tensor
    ) -> Tensor:
        """Return the scalar loss of maps ``(N, C_l, H_l, W_l)``, shallow to deep; the labels are not used."""
        pairs = paired_maps(student_features, teacher_features)
        return torch.stack([squared_discrepancy(seen, taught) for seen, taught in pairs]).sum()


def nst(student: ModelShape, teacher: ModelShape, *, weight: float = 50.0) -> list[Stage]:
    """Match the distribution of channels' activation patterns, added to cross-entropy (Huang and Wang, 2017).

    Args:
        student: The student, with feature maps.
        teacher: The teacher, with feature maps; its classes may be any.
        weight: Factor of the selectivity loss.
    """
    check_feature_maps(student, teacher)
    terms = {
        "ce": Term(nn.CrossEntropyLoss()),
        "selectivity": Term(NeuronSelectivityLoss(), constant(weight), student="features", teacher="features"),
    }
    return [Stage("classifier", terms)]
