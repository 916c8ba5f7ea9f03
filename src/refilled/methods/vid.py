r"""Variational information distillation: the student's maps predict the teacher's, with a learned variance.

References:
    Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019 (VID-I: between feature maps).
"""

from collections.abc import Sequence
from math import expm1, log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.losses.feature_maps import paired_channels, paired_maps
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, constant

_FIRST_VARIANCE = 5.0
_LEAST_VARIANCE = 1e-5


def gaussian_nll(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    r"""Return the mean negative log-likelihood of a Gaussian with one variance per channel, without the constant.

    .. math:: \operatorname{mean}\,\frac{1}{2}\left[\frac{(\mu - t)^2}{\sigma_c^2} + \log \sigma_c^2\right]

    Args:
        mean: ``(N, C, H, W)``.
        target: ``(N, C, H, W)``.
        variance: ``(C,)``.
    """
    variance = variance[:, None, None]
    return 0.5 * ((mean - target).square() / variance + variance.log()).mean()


class VariationalLoss(nn.Module):
    r""":func:`gaussian_nll` of the teacher's maps given the student's, summed over the pairs of maps.

    For each pair, :math:`\mu` is 1×1–ReLU–1×1–ReLU–1×1 on the student's map, without bias, and
    :math:`\sigma_c^2 = \mathrm{softplus}(\alpha_c) + 10^{-5}`, initially 5. Both are trained with the student.

    Args:
        channels: (C_S, C_T) of each pair of maps.
    """

    reads_labels = False

    def __init__(self, channels: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        first = log(expm1(_FIRST_VARIANCE - _LEAST_VARIANCE))  # softplus of this gives that variance
        self.means = nn.ModuleList(_mean(student, teacher) for student, teacher in channels)
        self.alphas = nn.ParameterList(torch.full((teacher,), first) for _, teacher in channels)

    @property
    def variances(self) -> list[Tensor]:
        """The variances ``(C_T,)`` of the teacher's channels, for each pair of maps."""
        return [F.softplus(alpha) + _LEAST_VARIANCE for alpha in self.alphas]

    def forward(
        self, student_features: tuple[Tensor, ...], teacher_features: tuple[Tensor, ...], labels: Tensor
    ) -> Tensor:
        """Return the scalar loss of maps ``(N, C_l, H_l, W_l)``, shallow to deep; the labels are not used."""
        pairs = paired_maps(student_features, teacher_features)
        losses = [
            gaussian_nll(mean(seen.to(variance.dtype)), taught.to(variance.dtype), variance)
            for mean, variance, (seen, taught) in zip(self.means, self.variances, pairs, strict=True)
        ]
        return torch.stack(losses).sum()


def _mean(student_channels: int, teacher_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
    )


def vid(student: ModelShape, teacher: ModelShape, *, weight: float = 1.0) -> list[Stage]:
    """Predict the teacher's feature maps, with learned variances, added to cross-entropy (Ahn et al., CVPR 2019).

    Args:
        student: The student, with feature maps.
        teacher: The teacher, with feature maps; its classes may be any.
        weight: Factor of the VID loss.
    """
    loss = VariationalLoss(paired_channels(student, teacher))
    terms = {
        "ce": Term(nn.CrossEntropyLoss()),
        "vid": Term(loss, constant(weight), student="features", teacher="features"),
    }
    return [Stage("classifier", terms)]
