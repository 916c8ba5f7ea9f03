r"""FitNet: a learned regressor maps an intermediate feature map of the student to the teacher's.

References:
    Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015 (Eq. 3).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import MethodError
from refilled.losses.feature_maps import paired_channels, same_size
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, constant


class HintLoss(nn.Module):
    r"""Mean squared error between the regressed map of the student and the map of the teacher.

    .. math:: \operatorname{mean}\,\big(R(F_S) - F_T\big)^2

    R is a 1×1 convolution with batch norm and ReLU. Maps of different size are first averaged down to the smaller one.
    The code commonly used for comparisons gives R a stride or a larger kernel instead.

    Args:
        student_channels: C_S of the hinted map.
        teacher_channels: C_T.
        hint: Index of the map, counted from the deep end; 1 is the last.
    """

    reads_labels = False

    def __init__(self, student_channels: int, teacher_channels: int, hint: int = 2) -> None:
        super().__init__()
        self.hint = hint
        self.convolution = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(teacher_channels)

    def forward(
        self, student_features: tuple[Tensor, ...], teacher_features: tuple[Tensor, ...], labels: Tensor
    ) -> Tensor:
        """Return the scalar loss of maps ``(N, C_l, H_l, W_l)``, shallow to deep; the labels are not used."""
        seen, taught = same_size(student_features[-self.hint], teacher_features[-self.hint].detach())
        regressed = F.relu(self.norm(self.convolution(seen.to(self.convolution.weight.dtype))))
        return F.mse_loss(regressed, taught.to(regressed.dtype))


def fitnet(student: ModelShape, teacher: ModelShape, *, weight: float = 100.0, hint: int = 2) -> list[Stage]:
    """Match a feature map through a learned regressor, added to cross-entropy (Romero et al., ICLR 2015).

    Training has one stage, as in published comparisons. The original first trains the layers up to the hint.

    Args:
        student: The student.
        teacher: The teacher; its classes may be any.
        weight: Factor of the hint loss.
        hint: Index of the pair of maps, counted from the deep end; 2 is the middle of three.
    """
    channels = paired_channels(student, teacher)
    if not 1 <= hint <= len(channels):
        raise MethodError(f"fitnet.hint={hint}: there are {len(channels)} pairs of feature maps, and 1 is the deepest")
    loss = HintLoss(*channels[-hint], hint)
    terms = {
        "ce": Term(nn.CrossEntropyLoss()),
        "hint": Term(loss, constant(weight), student="features", teacher="features"),
    }
    return [Stage("classifier", terms)]
