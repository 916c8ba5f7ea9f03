"""The first steps of a stage, in which only its heads are trained: the classifier, and the losses' own weights.

A fresh classifier or projector sends large, useless gradients into a network that starts from weights, which it then
leaves. If the heads are trained first, the network starts from a place that it can keep (Kumar et al., Fine-Tuning can
Distort Pretrained Features and Underperform Out-of-Distribution, ICLR 2022). The network does not change meanwhile, so
its embeddings are computed once.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice

import torch
from torch import Tensor, nn

from refilled.models import Backbone
from refilled.outputs import Outputs
from refilled.recipe import Recipe
from refilled.stages import Stage, Term, read_by, weighted_sum
from refilled.training.distributed import World

_LR = 1e-3


def terms_with_heads(stage: Stage) -> dict[str, Term]:
    """Return the terms of a stage that train the classifier or weights of their own, and read no feature maps."""
    return {name: term for name, term in stage.terms.items() if _has_head(term)}


def begins_with_heads(stage: Stage, recipe: Recipe) -> bool:
    """Return whether the first steps of a stage train only its heads."""
    return recipe.head_steps > 0 and bool(terms_with_heads(stage))


def heads_read_teacher(stage: Stage) -> bool:
    """Return whether one of these terms reads a teacher."""
    return any(term.teacher is not None for term in terms_with_heads(stage).values())


def _has_head(term: Term) -> bool:
    if "features" in (term.student, term.teacher):
        return False
    return term.student == "logits" or any(True for _ in term.loss.parameters())


def train_heads(
    student: Backbone,
    stage: Stage,
    steps: int,
    embedding: Tensor,
    taught: Sequence[Outputs | None],
    labels: Tensor,
    labelled: int,
    batches: Callable[[int], Sequence[Tensor]],
    world: World,
) -> None:
    """Train the classifier of the student and the weights of the stage's losses by Adam, at a rate of 0.001.

    Args:
        student: The student; only its classifier is changed.
        stage: The stage, whose terms have their weights of the first epoch.
        steps: Number of steps.
        embedding: The student's embeddings ``(N, d)`` of all images that the run sees, the labelled ones first.
        taught: Of each teacher, its outputs for the same images; None if the stage reads none.
        labels: Their class ids ``(N,)``; -1 for an image without a label.
        labelled: Number of labelled images.
        batches: The batches of a pass over the images, given its number from 0.
        world: The processes, each of which takes all steps.
    """
    terms = terms_with_heads(stage)
    weights = {name: term.weight(0) for name, term in terms.items()}
    heads = nn.ModuleList([student.classifier, *(term.loss for term in terms.values())])
    learned = [parameter for parameter in heads.parameters() if parameter.requires_grad]
    if not learned:
        return
    optimizer = torch.optim.Adam(learned, lr=_LR)
    rows = embedding.to(learned[0].dtype)
    for batch in islice(_endless(batches), steps):
        seen = Outputs(student.classifier(rows[batch]), rows[batch])
        of_teachers = [None if outputs is None else _rows_of(outputs, batch) for outputs in taught]
        known = int((batch < labelled).sum())
        losses = {name: term(seen, read_by(term, of_teachers), labels[batch], known) for name, term in terms.items()}
        optimizer.zero_grad()
        weighted_sum(weights, losses).backward()
        world.sum_gradients((), learned)
        optimizer.step()


def _endless(batches: Callable[[int], Sequence[Tensor]]) -> Iterator[Tensor]:
    return chain.from_iterable(map(batches, count()))


def _rows_of(outputs: Outputs, batch: Tensor) -> Outputs:
    return Outputs(outputs.logits[batch], outputs.embedding[batch])
