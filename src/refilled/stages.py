"""A method as data: stages of training, each a sum of weighted loss terms.

The training loop does not depend on the method. It reads the stages, which give the losses, their weight per epoch,
and the parts of the :class:`~refilled.outputs.Outputs` that each loss reads. Two kinds of plan have no student: a
:class:`Readout` trains nothing, and :class:`FineTuning` trains the teacher's network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp
from typing import Literal, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from refilled.errors import MethodError
from refilled.outputs import Outputs

Part = Literal["logits", "embedding", "features"]
Weight = Callable[[int], float]


def constant(weight: float) -> Weight:
    """Return a weight that is the same in every epoch."""
    return lambda epoch: weight


def exponential(start: float, rate: float) -> Weight:
    r"""Return a decaying weight: :math:`\mathrm{start}\cdot e^{-\mathrm{rate}\cdot\mathrm{epoch}}`, epochs from 0."""
    return lambda epoch: start * exp(-rate * epoch)


def warm_up(weight: float, epochs: int) -> Weight:
    """Return a weight that rises linearly over the first ``epochs`` and then is constant; 0: no rise."""
    return lambda epoch: weight * min(1.0, (epoch + 1) / max(epochs, 1))


@runtime_checkable
class Precomputes(Protocol):
    """A loss that may compute values from the teacher's embedding of the whole training set before its stage starts."""

    @property
    def needs_training_set(self) -> bool:
        """Whether :meth:`precompute` must be called, which embeds the whole training set."""

    def precompute(self, teacher_embedding: Tensor, labels: Tensor) -> None:
        """Compute the values from the whole training set.

        A loss that sees unlabelled images also gets theirs, after the labelled ones and with class id -1.

        Args:
            teacher_embedding: Embeddings ``(N, d)`` of the training images, without augmentation.
            labels: Their class ids ``(N,)``.
        """


def needs_training_set(loss: object) -> TypeGuard[Precomputes]:
    """Return whether a loss must see the teacher's embedding of the whole training set before its stage starts."""
    return isinstance(loss, Precomputes) and loss.needs_training_set


@runtime_checkable
class Reports(Protocol):
    """A loss that reports statistics of its last batch in addition to its value."""

    def statistics(self) -> Mapping[str, Tensor]:
        """Return scalars by name, for the log and the progress display."""


@dataclass(frozen=True)
class Term:
    """One loss, its weight, and the outputs that it reads.

    ``loss(student_tensor, teacher_tensor, labels)`` is called with the named parts. With ``teacher=None`` the
    call is ``loss(student_tensor, labels)``, as for :class:`torch.nn.CrossEntropyLoss`.
    """

    loss: nn.Module
    weight: Weight = field(default_factory=lambda: constant(1.0))
    student: Part = "logits"
    teacher: Part | None = None
    of: int = 0
    """Number of the teacher whose outputs are read, from 0."""

    @property
    def reads_labels(self) -> bool:
        """Whether the loss reads the labels; a loss that does not has an attribute ``reads_labels = False``."""
        return bool(getattr(self.loss, "reads_labels", True))

    @property
    def sees_unlabelled(self) -> bool:
        """Whether the loss uses images without labels, whose class id is -1.

        A loss that does not read the labels uses them. A loss that reads the labels and also uses unlabelled images
        has an attribute ``sees_unlabelled = True``.
        """
        return bool(getattr(self.loss, "sees_unlabelled", not self.reads_labels))

    def __call__(self, seen: Outputs, taught: Outputs | None, labels: Tensor, labelled: int | None = None) -> Tensor:
        """Return the scalar loss before weighting.

        Args:
            seen: The student's outputs for a batch.
            taught: The teacher's outputs.
            labels: Class ids ``(N,)``; -1 for an image without a label.
            labelled: Number of labelled images, which come first; None if all are labelled. A loss that does not use
                unlabelled images is called without them.
        """
        tensors = [getattr(seen, self.student)]
        if self.teacher is not None:
            tensors.append(getattr(taught, self.teacher))
        if labelled is not None and not self.sees_unlabelled:
            tensors, labels = [_first(part, labelled) for part in tensors], labels[:labelled]
        loss: Tensor = self.loss(*tensors, labels)
        return loss


def read_by(term: Term, taught: Sequence[Outputs | None]) -> Outputs | None:
    """Return the outputs that a term reads of those of all teachers; None if it reads no teacher."""
    return None if term.teacher is None else taught[term.of]


def weighted_sum(weights: Mapping[str, float], losses: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of scalar losses, each times its weight."""
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()


def _first(part: Tensor | tuple[Tensor, ...], count: int) -> Tensor | tuple[Tensor, ...]:
    """Return the first rows of an output, or of each feature map."""
    return part[:count] if isinstance(part, Tensor) else tuple(rows[:count] for rows in part)


@dataclass(frozen=True)
class Stage:
    """A stage of training with its own terms and a learning-rate schedule that starts from the top.

    ``share`` is the stage's share of the run's epochs, relative to the shares of the other stages.
    ``classifier="fresh"`` re-initialises the classifier when the stage starts.
    """

    name: str
    terms: Mapping[str, Term]
    share: float = 1.0
    classifier: Literal["keep", "fresh"] = "keep"
    rate: float = 1.0
    """Factor of the run's learning rate."""

    @property
    def sees_unlabelled(self) -> bool:
        """Whether any term uses images without labels."""
        return any(term.sees_unlabelled for term in self.terms.values())

    def reads(self, part: Part) -> bool:
        """Return whether any term reads this part of the teacher's outputs."""
        return any(term.teacher == part for term in self.terms.values())

    @property
    def needs_teacher(self) -> bool:
        """Whether any term reads an output of the teacher."""
        return any(term.teacher is not None for term in self.terms.values())

    def taught_by(self, number: int) -> "Stage":
        """Return the stage with only the terms of one teacher; those that read no teacher count as the first's."""
        own = {name: term for name, term in self.terms.items() if term.of == number}
        return replace(self, terms=own)

    @property
    def embedding_suffices(self) -> bool:
        """Whether the teacher outputs that terms read follow from its embedding, which can be cached; logits do."""
        return self.needs_teacher and not self.reads("features")


@dataclass(frozen=True)
class Readout:
    """Classification in the frozen teacher's embedding, instead of training.

    ``classify(train_embedding (N, d), train_labels (N,), embedding (M, d))`` returns the class ids ``(M,)``.
    """

    classify: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FineTuning:
    """Stages that train a copy of the teacher's network, with a fresh classifier, instead of a student."""

    stages: Sequence[Stage]


Plan = Sequence[Stage] | Readout | FineTuning
"""The return type of a method's function."""


def numbered(name: str, number: int) -> str:
    """Return the name of a term or figure of a teacher, which is counted from 0: ``name``, ``name@2``, ``name@3``."""
    return name if number == 0 else f"{name}@{number + 1}"


def of_several(plans: Mapping[int, Sequence[Stage]]) -> list[Stage]:
    """Join the stages that a method has with each of several teachers.

    Each teacher keeps its own terms, with their own projectors and trust. Terms that read no teacher, such as
    cross-entropy, occur once. The terms of K teachers have 1 / K of their weight, so that settings found with one
    teacher keep their weight against cross-entropy, and the learning rate need not change.

    AM-RADIO (Ranzinger et al., CVPR 2024) also has one projector per teacher and adds the balanced losses.

    Args:
        plans: By number of the teacher, the stages that the method has with it alone.

    Raises:
        MethodError: The numbers or names of the stages differ between teachers.
    """
    outlines = {
        tuple((stage.name, stage.share, stage.classifier, stage.rate) for stage in plan) for plan in plans.values()
    }
    if len(outlines) > 1:
        raise MethodError("the method has other stages for another teacher, so it takes one teacher only")
    joined = []
    for stages in zip(*plans.values(), strict=True):
        terms: dict[str, Term] = {}
        for number, stage in zip(plans, stages, strict=True):
            for name, term in stage.terms.items():
                if term.teacher is None:
                    terms.setdefault(name, term)
                else:
                    terms[numbered(name, number)] = replace(term, weight=_divided(term.weight, len(plans)), of=number)
        joined.append(replace(stages[0], terms=terms))
    return joined


def _divided(weight: Weight, by: int) -> Weight:
    return weight if by == 1 else lambda epoch: weight(epoch) / by
