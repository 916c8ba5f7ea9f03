r"""ReFilled: the student learns how a teacher compares images, whatever classes the teacher was trained on.

Both losses read only the teacher's embedding of the student's images:

* triplet alignment (stage 1) matches, for each triplet, the probability that an image is more similar to one of its
  class than to one of another class;
* local knowledge distillation (stage 2) matches the student's class probabilities with those of the teacher's
  nearest-class-mean classifier, over the classes in the batch.

References:
    Ye, Lu and Zhan, Distilling Cross-Task Knowledge via Relationship Matching, CVPR 2020.
"""

from typing import Literal, get_args

from torch import nn

from refilled.errors import MethodError
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

    The defaults are those of the paper for a teacher of other classes, unless a parameter says otherwise. Weights,
    factors, powers and temperatures have no unit.

    Args:
        student: The student.
        teacher: The teacher; its classes may be any, since only its embedding is read.
        temperature: tau of the teacher's triplet probabilities (Eq. 4). The paper has 2, and 4 for a teacher of the
            same classes (supplement 2.1).
        negatives: Impostors per same-class pair. ``nearest``: the nearest one that is farther than the positive (the
            paper, section 4.1). ``semihard``: all of them up to ``margin`` (the authors' later code).
        margin: For ``semihard``, the largest difference between the distances to impostor and positive, in embeddings
            of length 1; 0.2 in the authors' later code.
        reduction: Stage 1 sums over triplets (``sum``, Eq. 5) or averages (``mean``).
        triplet_weight: Factor of triplet alignment in stage 1; not in the paper, which has no other loss there.
        embedding_share: Share of the epochs for stage 1, in [0, 1]; in the paper both stages have 200 epochs.
        centers: Class centres of the teacher's local classifier. ``batch``: means over the batch (Eq. 7).
            ``leave-one-out``: the same without the image itself. ``global``: means over the training set.
        kd_classes: Classes of that classifier. ``batch``: those in the batch (Eq. 7). ``all``: all classes, which needs
            ``global`` centres.
        normalize: Scale the teacher's embedding to length 1 first; not in the paper.
        centered: Subtract the mean over the training set from the teacher's embedding first; not in the paper.
        kd_temperature: tau of the local classifier (Eq. 8); 2 and 4 as for ``temperature``.
        kd_weight: Weight of local distillation in the first epoch of its stage, ``1000 * lambda`` with lambda = 0.01
            (supplement 2.1), or 0.02 for CIFAR-100. 0: stage 2 has cross-entropy alone.
        kd_decay: Rate per epoch: the weight is multiplied by ``exp(-kd_decay)`` after each epoch; 0.05 in the paper. 0:
            the weight is constant.
        kd_average: Denominator of the mean in local distillation. ``images``: the number of images (Eq. 9).
            ``elements``: images times compared classes, as in the authors' first code, to which the factor of 1000
            belongs. A weight of 10 is then about 0.14 per image in a batch of 128.
        kd_targets: ``embedding``: local distillation. ``logits``: distillation of the teacher's own classifier, which
            needs a teacher of the same classes (Table 5).
        right_only: Leave out of local distillation the images that the teacher's local classifier gets wrong; not in
            the paper.
        kd_doubt: Power of the weight that reduces local distillation on unlabelled images where the teacher is unsure,
            for unlabelled images of other classes also. Needs ``global`` centres. 0: all weights are 1.
        kd_refine: Number of times that ``global`` centres are recomputed with the unlabelled images; 0 in the paper.
        similarity_weight: Weight in stage 2 of matching the teacher's similarities between the images of a batch
            (:mod:`refilled.methods.sp`), labelled or not; 0 in the paper.
        regression_weight: Weight in stage 2 of matching the direction of the teacher's centred embedding through a
            learned projector (:mod:`refilled.methods.regression`); 0 in the paper.
        trust: Power of the teacher's label information (:mod:`refilled.losses.trust`) by which the teacher's losses in
            stage 2 are multiplied. 0: all teachers have the same weight, as in the paper.
        worth: Number of labelled images per class that a teacher is worth whose embedding removes half of the labels'
            entropy. With more images per class, the weights of the teacher's losses in stage 2 fall. None: they do not,
            as in the paper.
        gamma: Train in one stage, with this weight of triplet alignment; 0.1 and 0.2 in supplement 3.4. None: train in
            two stages.
    """
    alignment = TripletAlignmentLoss(temperature=temperature, negatives=negatives, margin=margin, reduction=reduction)
    check_choice("kd_targets", kd_targets, get_args(Targets))
    if not 0 <= embedding_share <= 1:
        raise MethodError(f"embedding_share must be from 0 to 1, but is {embedding_share}")
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
