r"""Similarity preservation: images with similar teacher activations get similar student activations.

References:
    Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.losses.distances import at_least_float32, unit_rows
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, constant


def similarities(activations: Tensor) -> Tensor:
    r"""Return the inner products between the images of a batch, rows scaled to length 1: ``(N, ...) -> (N, N)``.

    .. math:: G_{i:} = \tilde G_{i:} / \|\tilde G_{i:}\|_2, \qquad \tilde G = Q Q^\top
    """
    flat = at_least_float32(activations).flatten(1)
    with torch.autocast(flat.device.type, enabled=False):
        return unit_rows(flat @ flat.T)


class SimilarityPreservingLoss(nn.Module):
    r"""Squared difference of :func:`similarities`, averaged over all pairs of images.

    .. math:: \frac{1}{N^2} \|G_T - G_S\|_F^2
    """

    reads_labels = False

    def forward(
        self, student: Tensor | tuple[Tensor, ...], teacher: Tensor | tuple[Tensor, ...], labels: Tensor
    ) -> Tensor:
        """Return the scalar loss of (the last of) the activations ``(N, ...)``; the labels are not used."""
        seen, taught = (last if isinstance(last, Tensor) else last[-1] for last in (student, teacher))
        target = similarities(taught.detach())
        return F.mse_loss(similarities(seen), target)


def sp(
    student: ModelShape,
    teacher: ModelShape,
    *,
    weight: float = 3000.0,
    of: Literal["features", "embedding"] = "features",
) -> list[Stage]:
    """Match the similarities between images of a batch, added to cross-entropy (Tung and Mori, ICCV 2019).

    Args:
        student: The student.
        teacher: The teacher; its classes may be any.
        weight: Factor of the loss.
        of: Output to compare: ``features``, the last feature map (the paper), or ``embedding``, which all teachers
            have.
    """
    terms = {
        "ce": Term(nn.CrossEntropyLoss()),
        "similarity": Term(SimilarityPreservingLoss(), constant(weight), student=of, teacher=of),
    }
    return [Stage("classifier", terms)]
