"""A student in three lines of Python."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from refilled.errors import TaskError
from refilled.export.student import open_student
from refilled.models import Backbone
from refilled.runs.inference import classifier_of, classify_by


class LoadedStudent(nn.Module):
    """A student with its classes.

    Attributes:
        classes: The names of the classes, in the order of the logits.
        model: The network.
    """

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        assert model.class_names is not None  # every student has them
        self.model, self.classes = model, model.class_names

    def forward(self, images: Tensor) -> Tensor:
        """Map RGB images ``(N, 3, H, W)``, uint8 or float in [0, 1], to logits ``(N, C)``."""
        logits: Tensor = self.model(images).logits
        return logits

    def predict(self, paths: str | PathLike[str] | Sequence[str | PathLike[str]]) -> list[tuple[str, float]]:
        """Return the most probable class of each image and its probability.

        Args:
            paths: Image files, or folders whose images, at any depth, are taken in the order of their names.

        Raises:
            TaskError: An image cannot be read, or there is none.
        """
        given = [paths] if isinstance(paths, str | PathLike) else paths
        found, unreadable = classify_by(classifier_of(self.model), [Path(path) for path in given])
        if unreadable:
            path, reason = unreadable[0]
            more = f", and {len(unreadable) - 1} more cannot be read" if len(unreadable) > 1 else ""
            raise TaskError(f"{path} cannot be read: {reason}{more}")
        return [max(probabilities.items(), key=lambda item: item[1]) for _, probabilities in found]


def load(folder: str | PathLike[str]) -> LoadedStudent:
    """Load the student of a run for use in Python, on the CPU and in evaluation mode.

    Args:
        folder: The run's folder.

    Raises:
        RunError: The folder holds no student.
        ModelError: The student is damaged.
    """
    return LoadedStudent(open_student(Path(folder))).eval()
