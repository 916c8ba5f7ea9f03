"""The result of a finished run: the content of ``result.json``."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from refilled.errors import RunError
from refilled.files import read_fields, require, write_atomic


@dataclass(frozen=True)
class Result:
    """The result of a finished run: the content of ``result.json``."""

    accuracy: float
    """Percent of the test images, or of the held-out ones if the run scores those, after the last epoch."""
    ncm_accuracy: float
    """Percent by the nearest class mean of the training images, in the embedding of the network that is scored."""
    class_accuracies: dict[str, float | None]
    stages: dict[str, dict[str, float]]
    """Nearest-class-mean accuracy after each stage but the last."""
    seconds: float
    """Time for training and loading, over all starts of the run."""
    parameters: int
    """Number of parameters of the network that is scored: the student, or the teacher for a readout."""
    data: dict[str, Any]
    teacher: dict[str, Any] | None
    versions: dict[str, str]
    hardware: dict[str, Any]
    balanced_accuracy: float | None = None
    """Mean of the class accuracies in percent; None without images, and in results of older versions."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a finished run's result.

        Raises:
            RunError: The run is not finished, or its result is damaged.
        """
        if not (folder / "DONE").exists():
            raise RunError(f"{folder} holds no finished run")
        path = folder / "result.json"
        found = read_fields(cls, path)
        require(path, found.data, fingerprint=str, task=str, image_size=int, images=dict, skipped=list, notes=list)
        require(path, found.data["images"], train=int, val=int, test=int)
        return found

    def save(self, folder: Path) -> None:
        """Write the result to a run's folder."""
        write_atomic(folder / "result.json", (json.dumps(asdict(self), indent=2) + "\n").encode())
