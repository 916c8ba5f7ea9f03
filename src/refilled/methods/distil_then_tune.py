"""Distil, then fine-tune: the student learns the teacher's embedding without labels, then the labels.

Other tools run two separate trainings. Here they are two stages of one run, at the cost of one training.

References:
    Lightly, LightlyTrain, ``method="distillation"`` (pretraining by a teacher's embedding, then fine-tuning);
    Chen et al., Improved Feature Distillation via Projector Ensemble, NeurIPS 2022 (a linear projector and the cosine).
"""

from torch import nn

from refilled.methods.regression import EmbeddingRegressionLoss
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term, constant


def distil_then_tune(
    student: ModelShape,
    teacher: ModelShape,
    *,
    distil_share: float = 0.8,
    weight: float = 10.0,
    tune_rate: float = 0.1,
) -> list[Stage]:
    """Distil the teacher's embedding without labels, then fine-tune on the labelled images (as LightlyTrain does).

    Args:
        student: The student.
        teacher: The teacher; its classes may be any.
        distil_share: Share of the epochs used for distillation.
        weight: Weight of the regression in the first stage, where it is the only loss.
        tune_rate: Factor of the learning rate in the second stage, which starts from a trained embedding.
    """
    regression = EmbeddingRegressionLoss(student.embedding_dim, teacher.embedding_dim)
    distil = Term(regression, constant(weight), student="embedding", teacher="embedding")
    return [
        Stage("distil", {"regression": distil}, share=distil_share),
        Stage("tune", {"ce": Term(nn.CrossEntropyLoss())}, share=1 - distil_share, classifier="fresh", rate=tune_rate),
    ]
