r"""Local knowledge distillation: the student learns the teacher's nearest-class-mean confidences.

References:
    Ye, Lu and Zhan, Distilling Cross-Task Knowledge via Relationship Matching, CVPR 2020 (Eq. 7 to 9).
"""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import MethodError
from refilled.losses import distances
from refilled.losses.checks import check_choice, check_positive
from refilled.losses.distances import at_least_float32, squared_distances, unit_rows
from refilled.losses.mining import check_batch

Centers = Literal["batch", "leave-one-out", "global"]
Classes = Literal["batch", "all"]
Average = Literal["images", "elements"]

_SHARPER = 0.25  # refined means come from surer shares than those that are distilled (docs/log.md)


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
    doubt: float = 0.0,
) -> Tensor:
    r"""Local knowledge distillation over the classes present in the batch (Eq. 7 to 9 of the paper).

    With :math:`p_c` the mean teacher embedding of class c, the teacher's probabilities are those of its
    nearest-class-mean classifier,

    .. math:: q_T(c|x) = \mathrm{softmax}_c\big(-\|\phi_T(x) - p_c\|^2 / \tau\big), \qquad
              \ell = \frac{1}{N} \sum_x \mathrm{KL}\big(q_T(\cdot|x) \,\|\, \mathrm{softmax}_c(f_S(x)_c / \tau_S)\big).

    Args:
        student_logits: ``(N, C)``, over all of the student's classes.
        teacher_embedding: ``(N, d)``; no gradient flows to it.
        labels: Class ids ``(N,)`` in ``0 .. C - 1``. If the means are given, -1 marks an unlabelled image, which is
            compared with all classes.
        temperature: :math:`\tau`.
        student_temperature: :math:`\tau_S`; 1 in the paper.
        centers: ``"batch"`` takes the means over the batch (the paper). ``"leave-one-out"`` excludes each image from
            the mean of its class, unless it is the only image of that class. A tensor ``(C, d)`` gives the means of
            all classes.
        classes: ``"batch"`` compares with the classes in the batch (the paper), ``"all"`` with all classes whose mean
            is given.
        normalize: Scale the teacher's embedding to length 1 first.
        right_only: Set the loss of images that the teacher's classifier gets wrong to 0, because a weak teacher would
            otherwise contradict the labels. The paper counts all images.
        average: ``"images"`` averages over images, as above. ``"elements"`` also divides by the number of compared
            classes, as :class:`torch.nn.KLDivLoss` does by default and the authors' first code did.
        doubt: Power of the weight :math:`1 - H(q_T) / \ln C'` of an unlabelled image. The weight is small where
            the teacher is unsure, for example on an image of another class. 0: all images have weight 1.

    Raises:
        MethodError: Shapes or labels do not fit.
    """
    check_batch(labels, student_logits, teacher_embedding)
    check_choice("average", average, get_args(Average))
    if isinstance(centers, Tensor) and bool((labels < 0).any()):
        known = _labelled(labels)
        others = _of_unlabelled(
            student_logits[~known],
            _teacher_rows(teacher_embedding[~known], normalize),
            centers,
            temperature=temperature,
            student_temperature=student_temperature,
            average=average,
            doubt=doubt,
        )
        if not bool(known.any()):
            return others
        of_labelled = local_kd(
            student_logits[known],
            teacher_embedding[known],
            labels[known],
            temperature=temperature,
            student_temperature=student_temperature,
            centers=centers,
            classes=classes,
            normalize=normalize,
            right_only=right_only,
            average=average,
        )
        return torch.lerp(others, of_labelled, known.sum() / len(labels))
    embedding = _teacher_rows(teacher_embedding, normalize)
    means, compared = distances.class_centers(embedding, labels)
    if isinstance(centers, Tensor):
        means, compared = _given_centers(centers, compared, classes, embedding)
    elif classes == "all":
        raise MethodError(
            f"centers={centers!r} does not give means of all classes, which classes='all' needs; give a tensor"
        )
    _check_classes(compared, student_logits.shape[1])
    squared = squared_distances(embedding, means)  # (N, C')
    own = labels[:, None] == compared
    if isinstance(centers, str) and centers == "leave-one-out":
        # The distance from x to the mean without x is n / (n - 1) times that to the mean with x.
        n = own.sum(0, dtype=squared.dtype)
        squared = torch.where(own, squared * (n / (n - 1).clamp(min=1)).square(), squared)
    log_q = F.log_softmax(-squared / temperature, dim=1)
    log_p = F.log_softmax(at_least_float32(student_logits)[:, compared] / student_temperature, dim=1)
    share = len(compared) if average == "elements" else 1
    if not right_only:
        return F.kl_div(log_p, log_q.to(log_p.dtype), reduction="batchmean", log_target=True) / share
    divergence = F.kl_div(log_p, log_q.to(log_p.dtype), reduction="none", log_target=True).sum(1)
    return torch.where(own.gather(1, log_q.argmax(1, keepdim=True)).squeeze(1), divergence, 0).mean() / share


def _of_unlabelled(
    student_logits: Tensor,
    embedding: Tensor,
    centers: Tensor,
    *,
    temperature: float,
    student_temperature: float,
    average: Average,
    doubt: float,
) -> Tensor:
    """Return the loss of unlabelled images, over all classes whose mean is known."""
    _check_width(centers, embedding)
    known = (~centers.isnan().any(1)).nonzero().flatten()
    log_q = F.log_softmax(-squared_distances(embedding, centers.to(embedding)[known]) / temperature, dim=1)
    log_p = F.log_softmax(at_least_float32(student_logits)[:, known] / student_temperature, dim=1).to(log_q.dtype)
    divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    if doubt > 0:
        entropy = -(log_q.exp() * log_q).sum(1)
        divergence = divergence * (1 - entropy / math.log(max(len(known), 2))).clamp(0, 1) ** doubt
    return divergence.mean() / (len(known) if average == "elements" else 1)


class LocalKDLoss(nn.Module):
    """Local knowledge distillation with its hyper-parameters; see :func:`local_kd`.

    Args:
        temperature: Temperature of the teacher's probabilities.
        student_temperature: Temperature of the student's probabilities; 1 in the paper.
        centers: Class means over the ``"batch"`` (the paper), ``"leave-one-out"``, or ``"global"`` for means over the
            whole training set. Global means are a buffer, set by ``class_centers``, by :meth:`precompute` or by loading
            a state dict.
        classes: ``"batch"`` compares with the classes in the batch (the paper), ``"all"`` with all classes, which needs
            global centres.
        normalize: Scale the teacher's embedding to length 1 first.
        centered: Subtract the mean over the training set from the teacher's embedding first. The mean is set by
            :meth:`precompute` or by loading a state dict.
        class_centers: Global class means ``(C, d)``, of embeddings scaled to length 1 if ``normalize``.
        right_only: Set the loss of images that the teacher's classifier gets wrong to 0.
        average: ``"images"`` or ``"elements"``.
        doubt: Power of the weight that reduces the loss of unlabelled images on which the teacher is unsure.
        refine: Number of times that the global class means are recomputed with the unlabelled images, each weighted by
            its share in every class at a quarter of the temperature (soft k-means; Ren et al., ICLR 2018). For
            unlabelled images of the same classes only. No effect if :meth:`precompute` gets no unlabelled images.

    Raises:
        MethodError: A parameter is out of range, or (on a call) shapes or labels do not fit, or the global class means
            are missing.
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
        doubt: float = 0.0,
        refine: int = 0,
    ) -> None:
        super().__init__()
        if doubt < 0 or refine < 0:
            raise MethodError(f"doubt and refine must be 0 or more, but are {doubt} and {refine}")
        check_choice("centers", centers, get_args(Centers))
        check_choice("average", average, get_args(Average))
        check_positive(temperature=temperature, student_temperature=student_temperature)
        check_choice("classes", classes, get_args(Classes))
        if classes == "all" and centers != "global":
            raise MethodError(f"classes='all' needs centers='global', but centers is '{centers}'")
        if class_centers is not None and centers != "global":
            raise MethodError(f"class_centers need centers='global', but centers is '{centers}'; remove one of them")
        if class_centers is not None and centered:
            raise MethodError(
                "class_centers do not include the mean that centered subtracts; drop centered, or use precompute()"
            )
        self.temperature = temperature
        self.student_temperature = student_temperature
        self.centers = centers
        self.classes = classes
        self.normalize = normalize
        self.centered = centered
        self.right_only = right_only
        self.average = average
        self.doubt = doubt
        self.refine = refine
        self.register_buffer("class_centers", class_centers)
        self.register_buffer("mean", None)

    @property
    def sees_unlabelled(self) -> bool:
        """Whether there are class means for unlabelled images that do not depend on the batch."""
        return self.centers == "global"

    @property
    def needs_training_set(self) -> bool:
        """Whether :meth:`precompute` must be called."""
        return self.centered or self.centers == "global"

    def precompute(self, teacher_embedding: Tensor, labels: Tensor) -> None:
        """Compute the mean and class means as configured, from the training set ``(N, d)`` with class ids ``(N,)``.

        Unlabelled images have class id -1. They contribute to the mean, and to the class means if ``refine`` > 0.
        """
        check_batch(labels, teacher_embedding)
        if self.centered:
            self.mean = at_least_float32(teacher_embedding).mean(0)
            teacher_embedding = teacher_embedding - self.mean
        if self.centers != "global":
            return
        rows, known = _teacher_rows(teacher_embedding, self.normalize), _labelled(labels)
        means, classes = distances.class_centers(rows[known], labels[known])
        _check_classes(classes)
        means = self._refined(means, classes, rows, labels)
        centers = means.new_full((int(classes[-1]) + 1, means.shape[1]), torch.nan)  # NaN: no image of that class
        self.class_centers = centers.index_copy(0, classes, means)

    def _refined(self, means: Tensor, classes: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """Recompute class means ``(C, d)`` over labelled and unlabelled rows ``(N, d)``, ``refine`` times."""
        unlabelled = rows[labels < 0]
        if not len(unlabelled):
            return means
        own = (labels[:, None] == classes).to(rows.dtype)[labels >= 0]
        for _ in range(self.refine):
            share = F.softmax(-squared_distances(unlabelled, means) / (_SHARPER * self.temperature), dim=1)
            share = torch.cat([own, share * share.amax(1, keepdim=True)])  # an unsure image has less weight
            means = share.T @ torch.cat([rows[labels >= 0], unlabelled]) / share.sum(0)[:, None]
        return means

    def forward(self, student_logits: Tensor, teacher_embedding: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of logits ``(N, C)`` and embedding ``(N, d)`` with class ids ``(N,)``."""
        if self.centered:
            teacher_embedding = teacher_embedding - self._precomputed(self.mean, "mean")
        return local_kd(
            student_logits,
            teacher_embedding,
            labels,
            temperature=self.temperature,
            student_temperature=self.student_temperature,
            centers=self._precomputed(self.class_centers, "class means") if self.centers == "global" else self.centers,
            classes=self.classes,
            normalize=self.normalize,
            right_only=self.right_only,
            average=self.average,
            doubt=self.doubt,
        )

    def extra_repr(self) -> str:
        """Return the hyper-parameters for printing."""
        names = ("centers", "classes", "temperature", "normalize", "centered", "right_only", "average")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _precomputed(self, buffer: Tensor | None, what: str) -> Tensor:
        if buffer is None:
            raise MethodError(
                f"LocalKDLoss({self.extra_repr()}) has no {what} of the training set yet; call "
                "precompute(teacher_embedding, labels) with the whole training set, or give class_centers"
            )
        return buffer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The numbers of classes and dimensions are known only from the loaded state.
        for name, wanted in (("class_centers", self.centers == "global"), ("mean", self.centered)):
            saved = state_dict.get(f"{prefix}{name}")
            if saved is not None and wanted:
                old = getattr(self, name)
                setattr(self, name, torch.empty_like(saved, device=None if old is None else old.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class LogitKDLoss(nn.Module):
    r"""Distillation of the teacher's logits instead of local distillation (Table 5 of the paper).

    .. math:: \mathrm{KL}\big(\mathrm{softmax}(z_T / \tau) \,\|\, \mathrm{softmax}(z_S)\big)

    As in Eq. 8, only the teacher's probabilities are softened. The teacher must have the same classes.

    Args:
        temperature: :math:`\tau`.
        average: ``"images"``, or ``"elements"`` to divide by the number of classes also.
    """

    reads_labels = False

    def __init__(self, temperature: float = 2.0, average: Average = "images") -> None:
        super().__init__()
        check_positive(temperature=temperature)
        check_choice("average", average, get_args(Average))
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
    """Return means and ids of the classes to compare with; they must include the classes in the batch."""
    _check_width(centers, embedding)
    _check_classes(present, len(centers))
    known = ~centers.isnan().any(1)
    missing = present[~known[present]].tolist()
    if missing:
        raise MethodError(
            f"class {missing[0]} had no image when the class means were computed; call precompute() again"
        )
    compared = present if classes == "batch" else known.nonzero().flatten()
    return centers.to(embedding)[compared], compared


def _labelled(labels: Tensor) -> Tensor:
    """Return whether each image has a label, ``(N,)``; class id -1 means no label."""
    if int(labels.min()) < -1:
        raise MethodError(f"class id {int(labels.min())} is neither a class nor -1 (no label)")
    return labels >= 0


def _check_width(centers: Tensor, embedding: Tensor) -> None:
    if centers.ndim != 2 or centers.shape[1] != embedding.shape[1]:
        raise MethodError(
            f"class means of shape {tuple(centers.shape)} do not fit teacher embeddings {tuple(embedding.shape)}; "
            "both must come from the same teacher"
        )


def _check_classes(classes: Tensor, number: float = torch.inf) -> None:
    low, high = int(classes[0]), int(classes[-1])
    if low < 0 or high >= number:
        raise MethodError(f"class id {low if low < 0 else high} is not in 0 .. {number} - 1; number the classes from 0")
