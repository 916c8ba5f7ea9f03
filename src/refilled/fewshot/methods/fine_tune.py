"""Gradient descent on the support images, for a new classifier alone or for all weights of the model.

References:
    Chen et al., A Closer Look at Few-shot Classification, ICLR 2019 (a new linear classifier, 100 steps);
    Ye, Lu and Zhan, CVPR 2020, supplement 2.1 (all weights, learning rate 1e-4, 50 epochs).
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from refilled.fewshot.bank import Bank, Learner, normalized, on_embeddings
from refilled.fewshot.meta_learner import query_loss
from refilled.fewshot.students import Classifier, Norm, StudentRecipe, student_learner, with_classifier
from refilled.outputs import ModelShape
from refilled.stages import Stage, Term


def tuned_classifier(support: Tensor, labels: Tensor, query: Tensor, *, steps: int, lr: float) -> Tensor:
    """Return the scores of T linear classifiers, each trained from zero by Adam on its support images.

    Args:
        support: ``(T, S, d)``.
        labels: ``(S,)``, 0 .. N - 1.
        query: ``(T, Q, d)``.
        steps: Steps on all support images.
        lr: Learning rate.

    Returns:
        ``(T, Q, N)``.
    """
    tasks, classes = len(support), int(labels.max()) + 1
    weight = support.new_zeros(tasks, support.shape[2], classes, requires_grad=True)
    bias = support.new_zeros(tasks, 1, classes, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr)
    for _ in range(steps):
        loss = tasks * query_loss(support @ weight + bias, labels)  # the mean is also over tasks; they share nothing
        weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
        optimizer.step()
    return (query @ weight + bias).detach()


def fine_tune(
    bank: Bank,
    *,
    layers: Literal["classifier", "all"] = "classifier",
    steps: int | None = None,
    lr: float | None = None,
    normalize: bool = True,
    classifier: Classifier = "random",
    norm: Norm = "batch",
) -> Learner:
    """Gradient descent on a new classifier, or on all weights of the model (Fine-Tune).

    Args:
        bank: The images and the model.
        layers: ``classifier``: the embedding is frozen; 100 steps of Adam at 0.01. ``all``: 50 steps of SGD at 1e-4 on
            all weights, on augmented images, as in the ReFilled paper.
        steps: Number of steps. None: as above.
        lr: Learning rate. None: as above.
        normalize: With ``classifier``, whether the embedding is L2-normalised.
        classifier: With ``all``, see :class:`~refilled.fewshot.students.StudentRecipe`.
        norm: With ``all``, see :class:`~refilled.fewshot.students.StudentRecipe`.
    """
    if layers == "all":
        recipe = StudentRecipe(steps=steps or 50, lr=lr or 1e-4, classifier=classifier, norm=norm)
        return student_learner(
            bank,
            partial(with_classifier, bank.model),
            _cross_entropy,
            recipe,
        )

    def classify(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        support, query = normalized(support, normalize), normalized(query, normalize)
        return tuned_classifier(support, labels, query, steps=steps or 100, lr=lr or 0.01)

    return on_embeddings(bank, classify)


def _cross_entropy(student: ModelShape, teacher: ModelShape | None) -> list[Stage]:
    return [Stage("classifier", {"ce": Term(nn.CrossEntropyLoss())})]
