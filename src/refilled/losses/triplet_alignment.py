r"""Triplet alignment: the student learns the similarity comparisons of the teacher.

References:
    Ye, Lu and Zhan, Distilling Cross-Task Knowledge via Relationship Matching, CVPR 2020 (Eq. 4 to 6).
"""

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import MethodError
from refilled.losses.checks import check_choice, check_positive
from refilled.losses.distances import (
    at_least_float32,
    lengths,
    pair_distances,
    pairwise_distances,
    root,
    squared_distances,
    unit_rows,
)
from refilled.losses.mining import Pairs, check_batch, impostors_within, nearest_impostors, same_class_pairs

Negatives = Literal["nearest", "semihard"]
Reduction = Literal["sum", "mean"]


def triplet_alignment(u_student: Tensor, u_teacher: Tensor) -> Tensor:
    r"""Return the divergence of the probabilities that a positive is nearer than the impostor (Eq. 4 to 6).

    For anchor i, positive j and impostor k, let :math:`u = (d_{ik} - d_{ij}) / \tau`, :math:`p = \mathrm{sigmoid}(u)`.
    With :math:`\rho = 1 - p_T`,

    .. math:: \mathrm{KL}(p_T \,\|\, p_S) = c(u_S) - c(u_T), \qquad c(u) = \rho u + \ln(1 + e^{-u})

    Args:
        u_student: ``(T,)``, computed with the student's temperature.
        u_teacher: ``(T,)`` of the same triplets, computed with the teacher's temperature.

    Returns:
        ``(T,)``.
    """
    rho = torch.sigmoid(-u_teacher)
    return rho * (u_student - u_teacher) - F.logsigmoid(u_student) + F.logsigmoid(u_teacher)


class FromUnitDistances(torch.autograd.Function):
    """A value computed from the distances between unit rows, with its known derivative by their squares.

    Triplets use few of the N² distances. Automatic differentiation would pass over all of them once per operation.
    With the derivative given, the backward pass is a single matrix product.
    """

    @staticmethod
    def forward(ctx: Any, embedding: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        """Return ``value``; its derivative by the squared distances of the rows of ``embedding`` is ``slope``.

        Args:
            ctx: Context of autograd.
            embedding: ``(N, d)``, before scaling to length 1.
            value: A scalar.
            slope: ``(N, N)``, symmetric; each pair is counted in both places.
        """
        ctx.save_for_backward(embedding, slope)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_value: Tensor) -> tuple[Tensor, None, None]:
        r"""Return :math:`2 \sum_k s_{ik} (x_i - x_k)`, minus its part along :math:`x_i`, over the length of row i."""
        embedding, slope = ctx.saved_tensors
        length = lengths(embedding)
        x = embedding / length
        pull = slope @ x
        return 2 * by_value * ((pull * x).sum(1, keepdim=True) * x - pull) / length, None, None


class TripletAlignmentLoss(nn.Module):
    r"""Triplet alignment: the student learns to compare images as the teacher does (Eq. 4 and 5 of the paper).

    Triplets are mined from the batch by the student's distances. The loss is the sum of their
    :func:`triplet_alignment`. Both embeddings are scaled to length 1 first. No gradient flows to the teacher's
    embedding.

    Args:
        temperature: Temperature of the teacher's probabilities; in the paper 2 across tasks and 4 on the same task.
        student_temperature: Temperature of the student's probabilities; 1 in the paper.
        negatives: ``"nearest"`` compares each same-class pair with the nearest impostor that is farther away than the
            positive, as in the paper. ``"semihard"`` compares it with all such impostors up to ``margin``, in one
            softmax, as in the authors' later code.
        margin: Largest difference of the distances to impostor and positive; only for ``"semihard"``.
        reduction: ``"sum"`` as in the paper, or ``"mean"`` over triplets (for ``"semihard"``, over pairs that have an
            impostor). The loss is 0 if there are none.

    Raises:
        MethodError: A parameter is out of range, or (on a call) the shapes do not fit.
    """

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        student_temperature: float = 1.0,
        negatives: Negatives = "nearest",
        margin: float = 0.2,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        check_choice("negatives", negatives, get_args(Negatives))
        check_choice("reduction", reduction, get_args(Reduction))
        check_positive(temperature=temperature, student_temperature=student_temperature, margin=margin)
        if negatives == "semihard" and min(temperature, student_temperature) < 0.02:
            raise MethodError(
                f"negatives='semihard' takes exp(1 / temperature), too large for temperatures below 0.02, "
                f"but they are {temperature} and {student_temperature}; raise them or use negatives='nearest'"
            )
        self.temperature = temperature
        self.student_temperature = student_temperature
        self.negatives = negatives
        self.margin = margin
        self.reduction = reduction
        self._statistics: dict[str, Tensor] = {}

    def forward(self, student_embedding: Tensor, teacher_embedding: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of embeddings ``(N, d_S)`` and ``(N, d_T)`` with class ids ``(N,)``."""
        check_batch(labels, student_embedding, teacher_embedding)
        student_embedding = at_least_float32(student_embedding)
        align = self._nearest if self.negatives == "nearest" else self._semihard
        with torch.no_grad():
            student, teacher = unit_rows(student_embedding), unit_rows(teacher_embedding.to(student_embedding.dtype))
            total, slope, number = align(student, teacher, same_class_pairs(labels))
            total += 0 * student.sum()  # keep NaN visible even if there are no triplets
        total = cast(Tensor, FromUnitDistances.apply(student_embedding, total, slope))
        return total if self.reduction == "sum" else total / number.clamp(min=1)

    def statistics(self) -> Mapping[str, Tensor]:
        """Return scalars about the last batch, on its device.

        ``triplets`` is their number. ``violated`` is the share of triplets whose impostor is nearer than the positive
        in the teacher's embedding. For ``"semihard"``, ``tuples`` is the number of pairs that have an impostor, and
        ``impostors`` is the mean number of impostors of these pairs.
        """
        return self._statistics

    def extra_repr(self) -> str:
        """Return the hyper-parameters for printing."""
        return f"negatives={self.negatives}, temperature={self.temperature}, reduction={self.reduction}"

    def _nearest(self, student: Tensor, teacher: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        squared = squared_distances(student)
        anchor, positive, negative = nearest_impostors(squared, pairs)
        first, second = anchor.repeat(2), torch.cat([positive, negative])  # (2T,)
        distance = root(squared[first, second])
        student_gap, teacher_gap = _gap(distance), _gap(pair_distances(teacher, first, second))  # (T,)
        u_student, u_teacher = student_gap / self.student_temperature, teacher_gap / self.temperature

        by_gap = (u_student.sigmoid() - u_teacher.sigmoid()) / self.student_temperature  # derivative of the loss
        by_squared = torch.cat([-by_gap, by_gap]) * _half_inverse(distance)
        slope = torch.zeros_like(squared)
        for cells in ((first, second), (second, first)):
            slope.index_put_(cells, by_squared, accumulate=True)
        number = teacher_gap.new_tensor(len(teacher_gap))
        self._statistics = {"triplets": number, "violated": (teacher_gap < 0).sum() / number.clamp(min=1)}
        return triplet_alignment(u_student, u_teacher).sum(), slope, number

    def _semihard(self, student: Tensor, teacher: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        r"""Sum over same-class pairs of the divergence between softmaxes over the positive and all its impostors.

        For a pair (i, j), let K be j and all k of other classes with :math:`d_{ij}^S < d_{ik}^S \leq d_{ij}^S + m`.
        With :math:`s_k = -d_{ik} / \tau` and :math:`Z = \sum_{k \in K} e^{s_k}`,

        .. math:: \mathrm{KL} = \frac{1}{Z_T} \sum_{k \in K} e^{s_k^T} (s_k^T - s_k^S) - \ln Z_T + \ln Z_S, \qquad
                  \frac{\partial\,\mathrm{KL}}{\partial s_k^S} = \frac{e^{s_k^S}}{Z_S} - \frac{e^{s_k^T}}{Z_T}.

        The exponentials depend only on (i, k), so each pair sums a subset of those of its anchor.
        """
        distance = pairwise_distances(student)
        e_student = (1 - distance).div_(self.student_temperature)  # the 1 keeps the exponentials in range
        e_teacher = (1 - pairwise_distances(teacher)).div_(self.temperature)
        weighted = e_teacher - e_student
        weighted.mul_(e_teacher.exp_())
        e_student.exp_()
        slope = torch.zeros_like(distance)
        total, tuples, impostors = student.new_zeros(3)
        for part, inside in impostors_within(distance, pairs, self.margin):
            number = inside.sum(1)
            inside[torch.arange(len(inside), device=inside.device), part.positive] = 1
            of_student = e_student.index_select(0, part.anchor).mul_(inside)  # (t, N)
            of_teacher = e_teacher.index_select(0, part.anchor).mul_(inside)
            z_student, z_teacher = of_student.sum(1, keepdim=True), of_teacher.sum(1, keepdim=True)  # (t, 1)
            slope.index_add_(0, part.anchor, (of_student.div_(z_student).sub_(of_teacher.div_(z_teacher))))
            product = inside.mul_(weighted.index_select(0, part.anchor)).sum(1) / z_teacher[:, 0]
            total += (product + (z_student / z_teacher).log()[:, 0]).sum()
            tuples += (number > 0).sum()
            impostors += number.sum()
        self._statistics = {"tuples": tuples, "impostors": impostors / tuples.clamp(min=1)}
        slope *= _half_inverse(distance) / -self.student_temperature
        return total, slope + slope.T, tuples


def _gap(distance: Tensor) -> Tensor:
    to_positive, to_negative = distance.chunk(2)
    return to_negative - to_positive


def _half_inverse(distance: Tensor) -> Tensor:
    # The derivative of a distance by its square; 0 where it does not exist.
    return torch.where(distance > 0, 0.5 / distance, 0)
