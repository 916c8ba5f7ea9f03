"""Training without a teacher: cross-entropy on the labels."""

from torch import nn

from refilled.outputs import ModelShape
from refilled.stages import Stage, Term


def vanilla(student: ModelShape, teacher: None) -> list[Stage]:
    """Train with cross-entropy on the labels, without a teacher."""
    return [Stage("classifier", {"ce": Term(nn.CrossEntropyLoss())})]
