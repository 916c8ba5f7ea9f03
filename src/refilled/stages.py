"""A method as data: stages of training, each a sum of weighted loss terms.

The training loop never asks which method it runs. It reads the stages: which losses, with what weight in
which epoch, and which parts of the :class:`~refilled.outputs.Outputs` each loss looks at. Two kinds of method have no
student of their own: a :class:`Readout` trains none, and :class:`FineTuning` trains the teacher's network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from refilled.outputs import Outputs

Part = Literal["logits", "embedding", "features"]
Weight = Callable[[int], float]


def constant(weight: float) -> Weight:
    """The same weight in every epoch."""
    return lambda epoch: weight


def exponential(start: float, rate: float) -> Weight:
    r"""A weight that decays: :math:`\mathrm{start}\cdot e^{-\mathrm{rate}\cdot\mathrm{epoch}}`, epochs from 0."""
    return lambda epoch: start * exp(-rate * epoch)


def warm_up(weight: float, epochs: int) -> Weight:
    """A weight that rises in equal steps over the first ``epochs`` and then stays; with 0 epochs it is constant."""
    return lambda epoch: weight * min(1.0, (epoch + 1) / max(epochs, 1))


@runtime_checkable
class Prepares(Protocol):
    """A loss that may look at the teacher's embedding of the whole training set before its stage begins."""

    @property
    def needs_training_set(self) -> bool:
        """Whether it wants to: embedding the whole training set costs time."""

    def prepare(self, teacher_embedding: Tensor, labels: Tensor) -> None:
        """Take ``(N, d)`` embeddings of the training images, not augmented, and their ``(N,)`` class ids.

        A loss that sees unlabelled images gets theirs too, after the labelled ones and with class id -1.
        """


@runtime_checkable
class Reports(Protocol):
    """A loss that has more to tell about its last batch than its value."""

    def statistics(self) -> Mapping[str, Tensor]:
        """Return scalars by name, for the log and the progress display."""


@dataclass(frozen=True)
class Term:
    """One loss, its weight, and the outputs that it reads.

    ``loss(student_tensor, teacher_tensor, labels)`` is called with the named parts; with ``teacher=None`` it
    is ``loss(student_tensor, labels)``, the call shape of :class:`torch.nn.CrossEntropyLoss`.
    """

    loss: nn.Module
    weight: Weight = field(default_factory=lambda: constant(1.0))
    student: Part = "logits"
    teacher: Part | None = None

    @property
    def reads_labels(self) -> bool:
        """Whether the loss looks at its labels; one that does not says so by an attribute ``reads_labels = False``."""
        return bool(getattr(self.loss, "reads_labels", True))

    @property
    def sees_unlabelled(self) -> bool:
        """Whether the loss has a use for images without labels, whose class id is -1.

        A loss that does not look at its labels does. One that does, where there are some, says so by an attribute
        ``sees_unlabelled = True``.
        """
        return bool(getattr(self.loss, "sees_unlabelled", not self.reads_labels))

    def __call__(self, seen: Outputs, taught: Outputs | None, labels: Tensor, labelled: int | None = None) -> Tensor:
        """Return the scalar loss, not yet weighted.

        Args:
            seen: The student's outputs for a batch.
            taught: The teacher's.
            labels: Class ids ``(N,)``; -1 for an image without a label.
            labelled: Number of images with labels, which come first; None if all have one. A loss that has no use for
                the others is called without them.
        """
        tensors = [getattr(seen, self.student)]
        if self.teacher is not None:
            tensors.append(getattr(taught, self.teacher))
        if labelled is not None and not self.sees_unlabelled:
            tensors, labels = [_first(part, labelled) for part in tensors], labels[:labelled]
        loss: Tensor = self.loss(*tensors, labels)
        return loss


def _first(part: Tensor | tuple[Tensor, ...], count: int) -> Tensor | tuple[Tensor, ...]:
    """Return the first rows of an output, or of each of several feature maps."""
    return part[:count] if isinstance(part, Tensor) else tuple(rows[:count] for rows in part)


@dataclass(frozen=True)
class Stage:
    """A stretch of training with its own terms and its own learning-rate schedule from the top.

    ``share`` is this stage's part of the run's epochs, relative to the shares of the other stages.
    ``classifier="fresh"`` draws the classifier anew when the stage begins.
    """

    name: str
    terms: Mapping[str, Term]
    share: float = 1.0
    classifier: Literal["keep", "fresh"] = "keep"
    rate: float = 1.0
    """Factor of the run's learning rate."""

    @property
    def sees_unlabelled(self) -> bool:
        """Whether some term has a use for images without labels."""
        return any(term.sees_unlabelled for term in self.terms.values())

    def reads(self, part: Part) -> bool:
        """Whether some term reads this part of the teacher's outputs."""
        return any(term.teacher == part for term in self.terms.values())

    @property
    def needs_teacher(self) -> bool:
        """Whether some term reads anything of the teacher's."""
        return any(term.teacher is not None for term in self.terms.values())

    @property
    def embedding_suffices(self) -> bool:
        """Whether what terms read of the teacher follows from its embedding, which can be kept on disk; logits do."""
        return self.needs_teacher and not self.reads("features")


@dataclass(frozen=True)
class Readout:
    """Classification in the frozen teacher's embedding, in place of training.

    ``classify(train_embedding (N, d), train_labels (N,), embedding (M, d))`` returns the class ids ``(M,)``.
    """

    classify: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FineTuning:
    """Stages that train a copy of the teacher's own network, with a fresh classifier, in the student's place."""

    stages: Sequence[Stage]


Plan = Sequence[Stage] | Readout | FineTuning
"""What a method's function returns."""
