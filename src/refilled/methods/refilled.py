r"""ReFilled: distil how a teacher compares images, whatever classes it was trained on.

Two losses, which read no more of the teacher than its embedding of the student's images:

* triplet alignment (stage 1) matches, triplet by triplet, how much more similar an image is to one of its class than
  to one of another class;
* local knowledge distillation (stage 2) matches the student's class probabilities with those of the teacher's
  nearest-class-mean classifier, over the classes in the batch.

References:
    Ye, Lu and Zhan, Distilling Cross-Task Knowledge via Relationship Matching, CVPR 2020.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled import distances
from refilled.distances import (
    at_least_float32,
    lengths,
    pair_distances,
    pairwise_distances,
    root,
    squared_distances,
    unit_rows,
)
from refilled.errors import MethodError, unknown
from refilled.methods.regression import EmbeddingRegressionLoss
from refilled.mining import Pairs, check_batch, impostors_within, nearest_impostors, same_class_pairs
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, constant, exponential
from refilled.trust import Trusted

Negatives = Literal["nearest", "semihard"]
Reduction = Literal["sum", "mean"]
Centers = Literal["batch", "leave-one-out", "global"]
Classes = Literal["batch", "all"]
Targets = Literal["embedding", "logits"]
Average = Literal["images", "elements"]


def triplet_alignment(u_student: Tensor, u_teacher: Tensor) -> Tensor:
    r"""Divergence of the probabilities that positives are more similar than impostors (Eq. 4 to 6 of the paper).

    For anchor i, positive j and impostor k let :math:`u = (d_{ik} - d_{ij}) / \tau`, :math:`p = \mathrm{sigmoid}(u)`.
    With :math:`\rho = 1 - p_T`,

    .. math:: \mathrm{KL}(p_T \,\|\, p_S) = c(u_S) - c(u_T), \qquad c(u) = \rho u + \ln(1 + e^{-u})

    Args:
        u_student: ``(T,)``, divided by the student's temperature.
        u_teacher: ``(T,)`` of the same triplets, divided by the teacher's temperature.

    Returns:
        ``(T,)``.
    """
    rho = torch.sigmoid(-u_teacher)
    return rho * (u_student - u_teacher) - F.logsigmoid(u_student) + F.logsigmoid(u_teacher)


class FromUnitDistances(torch.autograd.Function):
    """A value computed from the distances among unit rows, with its known derivative by their squares.

    Triplets touch few of the N² distances. Differentiating operation by operation would pass over all of them many
    times; this way a single product of matrices is left for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, embedding: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        """Return ``value``; its derivative by the squared distances of the rows of ``embedding`` is ``slope``.

        Args:
            ctx: Where autograd keeps what the backward pass needs.
            embedding: ``(N, d)``, not yet of length 1.
            value: A scalar.
            slope: ``(N, N)``, symmetric, each pair counted in both of its places.
        """
        ctx.save_for_backward(embedding, slope)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_value: Tensor) -> tuple[Tensor, None, None]:
        r"""Return :math:`2 \sum_k s_{ik} (x_i - x_k)`, less its part along :math:`x_i`, over the length of row i."""
        embedding, slope = ctx.saved_tensors
        length = lengths(embedding)
        x = embedding / length
        pull = slope @ x
        return 2 * by_value * ((pull * x).sum(1, keepdim=True) * x - pull) / length, None, None


class TripletAlignmentLoss(nn.Module):
    r"""Triplet alignment: the student learns to compare images as the teacher does (Eq. 4 and 5 of the paper).

    Triplets are mined from the batch by the student's distances, and the divergence of
    :func:`triplet_alignment` is summed over them. Both embeddings are brought to length 1 first. The teacher's
    embedding is a constant: no gradient flows to it.

    Args:
        temperature: Softens the teacher's probabilities; 2 across tasks and 4 on the same task in the paper.
        student_temperature: Of the student's probabilities; 1 in the paper.
        negatives: ``"nearest"`` compares each pair of one class with the nearest of the impostors that are farther
            away, as the paper does; ``"semihard"`` with all of them up to ``margin``, in one softmax, as the authors
            did later.
        margin: How much farther than the positive an impostor may be; only for ``"semihard"``.
        reduction: ``"sum"`` as in the paper, or ``"mean"`` over triplets (over pairs that have an impostor, for
            ``"semihard"``). It is 0 where there are none.

    Raises:
        MethodError: A parameter is out of its range, or (on a call) the shapes do not fit.
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
        _check_choice("negatives", negatives, get_args(Negatives))
        _check_choice("reduction", reduction, get_args(Reduction))
        _check_positive(temperature=temperature, student_temperature=student_temperature, margin=margin)
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
            total += 0 * student.sum()  # NaN must show, even where it leaves no triplets
        total = cast(Tensor, FromUnitDistances.apply(student_embedding, total, slope))
        return total if self.reduction == "sum" else total / number.clamp(min=1)

    def statistics(self) -> Mapping[str, Tensor]:
        """Scalars about the last batch, on its device.

        ``triplets``: how many there were; ``violated``: the share of them in which the teacher finds the impostor
        nearer than the positive. For ``"semihard"`` instead ``tuples``: pairs with an impostor; ``impostors``:
        their mean number.
        """
        return self._statistics

    def extra_repr(self) -> str:
        """Name the hyper-parameters when printed."""
        return f"negatives={self.negatives}, temperature={self.temperature}, reduction={self.reduction}"

    def _nearest(self, student: Tensor, teacher: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        squared = squared_distances(student)
        anchor, positive, negative = nearest_impostors(squared, pairs)
        first, second = anchor.repeat(2), torch.cat([positive, negative])  # (2T,)
        distance = root(squared[first, second])
        student_gap, teacher_gap = _gap(distance), _gap(pair_distances(teacher, first, second))  # (T,)
        u_student, u_teacher = student_gap / self.student_temperature, teacher_gap / self.temperature

        by_gap = (u_student.sigmoid() - u_teacher.sigmoid()) / self.student_temperature  # of the loss
        by_squared = torch.cat([-by_gap, by_gap]) * _half_inverse(distance)
        slope = torch.zeros_like(squared)
        for cells in ((first, second), (second, first)):
            slope.index_put_(cells, by_squared, accumulate=True)
        number = teacher_gap.new_tensor(len(teacher_gap))
        self._statistics = {"triplets": number, "violated": (teacher_gap < 0).sum() / number.clamp(min=1)}
        return triplet_alignment(u_student, u_teacher).sum(), slope, number

    def _semihard(self, student: Tensor, teacher: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        r"""Sum over pairs of one class of the divergence between softmaxes over the positive and all its impostors.

        For a pair (i, j) let K be j and all k of other classes with :math:`d_{ij}^S < d_{ik}^S \leq d_{ij}^S + m`.
        With :math:`s_k = -d_{ik} / \tau` and :math:`Z = \sum_{k \in K} e^{s_k}`,

        .. math:: \mathrm{KL} = \frac{1}{Z_T} \sum_{k \in K} e^{s_k^T} (s_k^T - s_k^S) - \ln Z_T + \ln Z_S, \qquad
                  \frac{\partial\,\mathrm{KL}}{\partial s_k^S} = \frac{e^{s_k^S}}{Z_S} - \frac{e^{s_k^T}}{Z_T}.

        The exponentials depend on (i, k) alone, so that a pair only adds up some of those of its anchor.
        """
        distance = pairwise_distances(student)
        e_student = (1 - distance).div_(self.student_temperature)  # the 1 only keeps the exponentials in range
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
    # The derivative of a distance by its square; 0 where there is none.
    return torch.where(distance > 0, 0.5 / distance, 0)


def local_kd(
    student_logits: Tensor,
    teacher_embedding: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    student_temperature: float = 1.0,
    centers: Literal["batch", "leave-one-out"] | Tensor = "batch",
    classes: Classes = "batch",
    normalize: bool = False,
    right_only: bool = False,
    average: Average = "images",
) -> Tensor:
    r"""Local knowledge distillation over the classes present in the batch (Eq. 7 to 9 of the paper).

    With :math:`p_c` the mean teacher embedding of class c, the teacher's probabilities are those of its
    nearest-class-mean classifier,

    .. math:: q_T(c|x) = \mathrm{softmax}_c\big(-\|\phi_T(x) - p_c\|^2 / \tau\big), \qquad
              \ell = \frac{1}{N} \sum_x \mathrm{KL}\big(q_T(\cdot|x) \,\|\, \mathrm{softmax}_c(f_S(x)_c / \tau_S)\big).

    Args:
        student_logits: ``(N, C)``, over all of the student's classes.
        teacher_embedding: ``(N, d)``; a constant, no gradient flows to it.
        labels: Class ids ``(N,)`` in ``0 .. C - 1``.
        temperature: :math:`\tau`.
        student_temperature: :math:`\tau_S`; 1 in the paper.
        centers: ``"batch"`` takes the means over the batch (the paper). ``"leave-one-out"`` leaves each image out of
            the mean of its own class; the only image of a class remains that class's mean. A tensor ``(C, d)`` gives
            the means, computed elsewhere, of all classes.
        classes: ``"batch"`` compares with the classes in the batch (the paper), ``"all"`` with all whose mean is given.
        normalize: Bring the teacher's embedding to length 1 first.
        right_only: Count images that the teacher's classifier gets wrong as 0, for a teacher that knows little would
            otherwise contradict the labels; the paper counts all.
        average: Over ``"images"`` as above; ``"elements"`` divides by the number of compared classes too, as
            :class:`torch.nn.KLDivLoss` does by default and the authors' first code did.

    Raises:
        MethodError: Shapes or labels do not fit.
    """
    check_batch(labels, student_logits, teacher_embedding)
    _check_choice("average", average, get_args(Average))
    embedding = _teacher_rows(teacher_embedding, normalize)
    means, compared = distances.class_centers(embedding, labels)
    if isinstance(centers, Tensor):
        means, compared = _given_centers(centers, compared, classes, embedding)
    elif classes == "all":
        raise MethodError(
            f"means over the batch are not known for all classes, but classes='all' and centers={centers!r}"
        )
    _check_classes(compared, student_logits.shape[1])
    squared = squared_distances(embedding, means)  # (N, C')
    own = labels[:, None] == compared
    if isinstance(centers, str) and centers == "leave-one-out":
        # The mean without x lies n / (n - 1) times as far from x as the mean with it.
        n = own.sum(0, dtype=squared.dtype)
        squared = torch.where(own, squared * (n / (n - 1).clamp(min=1)).square(), squared)
    log_q = F.log_softmax(-squared / temperature, dim=1)
    log_p = F.log_softmax(at_least_float32(student_logits)[:, compared] / student_temperature, dim=1)
    share = len(compared) if average == "elements" else 1
    if not right_only:
        return F.kl_div(log_p, log_q.to(log_p.dtype), reduction="batchmean", log_target=True) / share
    divergence = F.kl_div(log_p, log_q.to(log_p.dtype), reduction="none", log_target=True).sum(1)
    return torch.where(own.gather(1, log_q.argmax(1, keepdim=True)).squeeze(1), divergence, 0).mean() / share


class LocalKDLoss(nn.Module):
    """Local knowledge distillation, with its hyper-parameters: see :func:`local_kd`.

    Args:
        temperature: Of the teacher's probabilities.
        student_temperature: Of the student's; 1 in the paper.
        centers: Class means over the ``"batch"`` (the paper), ``"leave-one-out"``, or ``"global"``: over the whole
            training set. The global ones are a buffer, from ``class_centers``, from :meth:`prepare` or from a loaded
            state dict.
        classes: ``"batch"`` compares with the classes in the batch (the paper), ``"all"`` with all of them, for which
            the centres must be global.
        normalize: Bring the teacher's embedding to length 1 first.
        centered: Take the training set's mean away from the teacher's embedding before all else; :meth:`prepare` or a
            loaded state dict gives it.
        class_centers: Global class means ``(C, d)``, of embeddings brought to length 1 if ``normalize``.
        right_only: Count images that the teacher's classifier gets wrong as 0.
        average: Over ``"images"``, or ``"elements"``.

    Raises:
        MethodError: A parameter is out of its range, or (on a call) shapes or labels do not fit, or the global class
            means are missing.
    """

    class_centers: Tensor | None
    mean: Tensor | None

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        student_temperature: float = 1.0,
        centers: Centers = "batch",
        classes: Classes = "batch",
        normalize: bool = False,
        centered: bool = False,
        class_centers: Tensor | None = None,
        right_only: bool = False,
        average: Average = "images",
    ) -> None:
        super().__init__()
        _check_choice("centers", centers, get_args(Centers))
        _check_choice("average", average, get_args(Average))
        _check_positive(temperature=temperature, student_temperature=student_temperature)
        _check_choice("classes", classes, get_args(Classes))
        if classes == "all" and centers != "global":
            raise MethodError(f"classes='all' needs centers='global', but centers is '{centers}'")
        if class_centers is not None and centers != "global":
            raise MethodError(f"class_centers are for centers='global', but centers is '{centers}'; drop one of them")
        if class_centers is not None and centered:
            raise MethodError("class_centers do not say which mean was taken away; drop centered, or use prepare()")
        self.temperature = temperature
        self.student_temperature = student_temperature
        self.centers = centers
        self.classes = classes
        self.normalize = normalize
        self.centered = centered
        self.right_only = right_only
        self.average = average
        self.register_buffer("class_centers", class_centers)
        self.register_buffer("mean", None)

    @property
    def needs_training_set(self) -> bool:
        """Whether :meth:`prepare` has anything to do."""
        return self.centered or self.centers == "global"

    def prepare(self, teacher_embedding: Tensor, labels: Tensor) -> None:
        """Take what is wanted, mean and class means, from the whole training set ``(N, d)`` with class ids ``(N,)``."""
        check_batch(labels, teacher_embedding)
        if self.centered:
            self.mean = at_least_float32(teacher_embedding).mean(0)
            teacher_embedding = teacher_embedding - self.mean
        if self.centers != "global":
            return
        means, classes = distances.class_centers(_teacher_rows(teacher_embedding, self.normalize), labels)
        _check_classes(classes)
        centers = means.new_full((int(classes[-1]) + 1, means.shape[1]), torch.nan)  # NaN: no image of that class
        self.class_centers = centers.index_copy(0, classes, means)

    def forward(self, student_logits: Tensor, teacher_embedding: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of logits ``(N, C)`` and embedding ``(N, d)`` with class ids ``(N,)``."""
        if self.centered:
            teacher_embedding = teacher_embedding - self._prepared(self.mean, "mean")
        return local_kd(
            student_logits,
            teacher_embedding,
            labels,
            temperature=self.temperature,
            student_temperature=self.student_temperature,
            centers=self._prepared(self.class_centers, "class means") if self.centers == "global" else self.centers,
            classes=self.classes,
            normalize=self.normalize,
            right_only=self.right_only,
            average=self.average,
        )

    def extra_repr(self) -> str:
        """Name the hyper-parameters when printed."""
        names = ("centers", "classes", "temperature", "normalize", "centered", "right_only", "average")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _prepared(self, buffer: Tensor | None, what: str) -> Tensor:
        if buffer is None:
            raise MethodError(
                f"LocalKDLoss({self.extra_repr()}) has no {what} of the training set yet; call "
                "prepare(teacher_embedding, labels) with the whole training set, or give class_centers"
            )
        return buffer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # How many classes and dimensions there are is only known from what is loaded.
        for name, wanted in (("class_centers", self.centers == "global"), ("mean", self.centered)):
            saved = state_dict.get(f"{prefix}{name}")
            if saved is not None and wanted:
                old = getattr(self, name)
                setattr(self, name, torch.empty_like(saved, device=None if old is None else old.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class LogitKDLoss(nn.Module):
    r"""Distillation of the teacher's own classifier, in the place of local distillation (Table 5 of the paper).

    .. math:: \mathrm{KL}\big(\mathrm{softmax}(z_T / \tau) \,\|\, \mathrm{softmax}(z_S)\big)

    As in Eq. 8, only the teacher is softened. It needs a teacher of the same classes.

    Args:
        temperature: tau.
        average: Over ``"images"``, or ``"elements"``: divided by the number of classes too.
    """

    def __init__(self, temperature: float = 2.0, average: Average = "images") -> None:
        super().__init__()
        _check_positive(temperature=temperature)
        _check_choice("average", average, get_args(Average))
        self.temperature = temperature
        self.average = average

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of ``(N, C)`` logits; the labels are not used."""
        log_p = F.log_softmax(at_least_float32(student_logits), dim=1)
        log_q = F.log_softmax(at_least_float32(teacher_logits.detach()) / self.temperature, dim=1)
        share = log_p.shape[1] if self.average == "elements" else 1
        return F.kl_div(log_p, log_q.to(log_p.dtype), reduction="batchmean", log_target=True) / share


def _teacher_rows(embedding: Tensor, normalize: bool) -> Tensor:
    embedding = embedding.detach()
    return unit_rows(embedding) if normalize else at_least_float32(embedding)


def _given_centers(centers: Tensor, present: Tensor, classes: Classes, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Means and ids of the classes to compare with, of which those in the batch must be some."""
    if centers.ndim != 2 or centers.shape[1] != embedding.shape[1]:
        raise MethodError(
            f"class means of shape {tuple(centers.shape)} do not fit teacher embeddings {tuple(embedding.shape)}; "
            "both must come from the same teacher"
        )
    _check_classes(present, len(centers))
    known = ~centers.isnan().any(1)
    missing = present[~known[present]].tolist()
    if missing:
        raise MethodError(f"class {missing[0]} had no image when the class means were taken; prepare them anew")
    compared = present if classes == "batch" else known.nonzero().flatten()
    return centers.to(embedding)[compared], compared


def _check_classes(classes: Tensor, number: float = torch.inf) -> None:
    low, high = int(classes[0]), int(classes[-1])
    if low < 0 or high >= number:
        raise MethodError(f"class id {low if low < 0 else high} is not in 0 .. {number} - 1; number the classes from 0")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise MethodError(unknown(name, value, choices))


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise MethodError(f"{name} must be greater than 0, but is {value}")


def refilled(
    student: ModelShape,
    teacher: ModelShape,
    *,
    temperature: float = 2.0,
    negatives: Negatives = "nearest",
    margin: float = 0.2,
    reduction: Reduction = "sum",
    triplet_weight: float = 1.0,
    embedding_share: float = 0.5,
    centers: Centers = "batch",
    kd_classes: Classes = "batch",
    normalize: bool = False,
    centered: bool = False,
    kd_temperature: float = 2.0,
    kd_weight: float = 10.0,
    kd_decay: float = 0.05,
    kd_average: Average = "elements",
    kd_targets: Targets = "embedding",
    right_only: bool = False,
    regression_weight: float = 0.0,
    trust: float = 0.0,
    worth: float | None = None,
    gamma: float | None = None,
) -> list[Stage]:
    """Match triplets in the embedding, then distil a local classifier (Ye, Lu and Zhan, CVPR 2020).

    Args:
        student: The student.
        teacher: The teacher; its classes may be any, since only its embedding is read.
        temperature: tau of the teacher's triplet probabilities (2; the paper takes 4 for a same-task teacher).
        negatives: ``nearest``: one impostor for each pair (paper); ``semihard``: all within ``margin`` (tuples).
        margin: How much farther than the positive an impostor may be, for ``semihard``.
        reduction: Whether stage 1 sums over triplets (Eq. 5) or averages.
        triplet_weight: Factor of the triplet alignment in stage 1.
        embedding_share: Part of the epochs that goes to stage 1; the paper gives each stage 200.
        centers: Where the class centres of the teacher's local classifier come from (``batch``: Eq. 7).
        kd_classes: Which classes that classifier chooses from: those in the ``batch`` (Eq. 7), or ``all``, for which
            the centres must be ``global``.
        normalize: Whether that classifier L2-normalises the teacher's embedding.
        centered: Whether it takes the training set's mean away first.
        kd_temperature: tau of the local classifier (Eq. 8).
        kd_weight: Weight of local distillation in the first epoch of its stage: ``1000 * lambda`` with lambda = 0.01
            (supplement 2.1; 0.02 for CIFAR-100). With 0, stage 2 is cross-entropy alone.
        kd_decay: The weight falls by ``exp(-kd_decay)`` each epoch; with 0 it stays.
        kd_average: Over what distillation is a mean. ``elements``: images times the classes compared, which the paper's
            factor of 1000 goes with (as in the authors' first code): of 10, some 0.14 for each image of a batch of 128.
            ``images``: the divergence of an image, as Eq. 9 has it.
        kd_targets: ``embedding``: local distillation; ``logits``: of the teacher's own classifier (Table 5), for a
            teacher of the same classes.
        right_only: Whether local distillation leaves out the images that the teacher's local classifier gets wrong.
        regression_weight: Weight, beside the classifier, of pointing where the teacher's centred embedding points,
            through a learned projector (see :mod:`refilled.methods.regression`); not in the paper.
        trust: Weigh stage 2's terms of the teacher by what its embedding says about the training labels, to this
            power (see :mod:`refilled.trust`); 0 trusts every teacher alike, as the paper does.
        worth: If given, let those terms count as a prior does: like so many labelled images of each class, for a
            teacher that knows half of the labels, more for a better one; the weights fall where there are more images.
        gamma: If given, train in one stage, with the triplet alignment at this weight (supplement 3.4).
    """
    alignment = TripletAlignmentLoss(temperature=temperature, negatives=negatives, margin=margin, reduction=reduction)
    _check_choice("kd_targets", kd_targets, get_args(Targets))
    classify = {"ce": Term(nn.CrossEntropyLoss())}
    if kd_weight > 0 and kd_targets == "embedding":
        local = LocalKDLoss(
            temperature=kd_temperature,
            centers=centers,
            classes=kd_classes,
            normalize=normalize,
            centered=centered,
            right_only=right_only,
            average=kd_average,
        )
        classify["local_kd"] = Term(
            _trusted(local, trust, worth), exponential(kd_weight, kd_decay), teacher="embedding"
        )
    elif kd_weight > 0:
        classify["kd"] = Term(
            LogitKDLoss(kd_temperature, kd_average), exponential(kd_weight, kd_decay), teacher="logits"
        )
    if regression_weight > 0:
        projected = _trusted(EmbeddingRegressionLoss(student.embedding_dim, teacher.embedding_dim), trust, worth)
        classify["regression"] = Term(projected, constant(regression_weight), student="embedding", teacher="embedding")
    if gamma is not None:
        aligned = Term(alignment, constant(gamma), student="embedding", teacher="embedding")
        return [Stage("joint", {"alignment": aligned, **classify})]
    aligned = Term(alignment, constant(triplet_weight), student="embedding", teacher="embedding")
    return [
        Stage("embedding", {"alignment": aligned}, share=embedding_share),
        Stage("classifier", classify, share=1 - embedding_share, classifier="fresh"),
    ]


def _trusted(loss: nn.Module, power: float, worth: float | None) -> nn.Module:
    return loss if power == 0 and worth is None else Trusted(loss, power, worth)
