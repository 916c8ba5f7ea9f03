r"""ReFilled: distil how a teacher compares images, whatever classes it was trained on.

Two losses, which read no more of the teacher than its embedding of the student's images:

* triplet alignment (stage 1) matches, triplet by triplet, how much more similar an image is to one of its class than
  to one of another class;
* local knowledge distillation (stage 2) matches the student's class probabilities with those of the teacher's
  nearest-class-mean classifier, over the classes in the batch.

References:
    Ye, Lu and Zhan, Distilling Cross-Task Knowledge via Relationship Matching, CVPR 2020.
"""

from typing import Literal, get_args

from torch import nn

from refilled.losses.checks import check_choice
from refilled.losses.local_kd import Average, Centers, Classes, LocalKDLoss, LogitKDLoss
from refilled.losses.triplet_alignment import Negatives, Reduction, TripletAlignmentLoss
from refilled.losses.trust import Trusted
from refilled.methods.regression import EmbeddingRegressionLoss
from refilled.methods.sp import SimilarityPreservingLoss
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, constant, exponential

Targets = Literal["embedding", "logits"]


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
    kd_doubt: float = 0.0,
    kd_refine: int = 0,
    similarity_weight: float = 0.0,
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
        kd_doubt: Power of the weight by which an unlabelled image counts less in local distillation where the
            teacher is unsure; for unlabelled images among which there are other classes. With ``global`` centres.
        kd_refine: Number of times that ``global`` centres are taken anew over unlabelled images too.
        similarity_weight: Weight, beside the classifier, of matching which images of a batch the teacher finds similar
            (see :mod:`refilled.methods.sp`), labelled or not; not in the paper.
        regression_weight: Weight, beside the classifier, of pointing where the teacher's centred embedding points,
            through a learned projector (see :mod:`refilled.methods.regression`); not in the paper.
        trust: Weigh stage 2's terms of the teacher by what its embedding says about the training labels, to this
            power (see :mod:`refilled.losses.trust`); 0 trusts every teacher alike, as the paper does.
        worth: If given, those terms act as a prior worth this number of labelled images per class, for a teacher whose
            embedding removes half of the labels' entropy; a better teacher is worth more. With more images than that,
            the weights fall.
        gamma: If given, train in one stage, with the triplet alignment at this weight (supplement 3.4).
    """
    alignment = TripletAlignmentLoss(temperature=temperature, negatives=negatives, margin=margin, reduction=reduction)
    check_choice("kd_targets", kd_targets, get_args(Targets))
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
            doubt=kd_doubt,
            refine=kd_refine,
        )
        classify["local_kd"] = Term(
            _trusted(local, trust, worth), exponential(kd_weight, kd_decay), teacher="embedding"
        )
    elif kd_weight > 0:
        classify["kd"] = Term(
            LogitKDLoss(kd_temperature, kd_average), exponential(kd_weight, kd_decay), teacher="logits"
        )
    if similarity_weight > 0:
        similar = _trusted(SimilarityPreservingLoss(), trust, worth)
        classify["similarity"] = Term(similar, constant(similarity_weight), student="embedding", teacher="embedding")
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
