"""A student as one function from images to logits, and what a program must know to call it."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import RunError
from refilled.models import Backbone, load_model
from refilled.runs.folder import RunFolder

TOLERANCE = 1e-4
"""The largest absolute difference between the logits of an exported file and of torch."""

BATCHES = (1, 3, 8)
"""The batch sizes at which an exported file is compared with torch."""


class Deployed(nn.Module):
    """A student that maps images ``(N, 3, S, S)`` to logits ``(N, C)``.

    Args:
        model: The student, in evaluation mode on the CPU.
        preprocess: Whether the images are uint8 and the module scales and normalises them. Otherwise they are float32
            and already normalised.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Backbone, preprocess: bool = False) -> None:
        super().__init__()
        self.model, self.preprocess = model, preprocess
        self.register_buffer("mean", 255 * model.mean.detach().clone())
        self.register_buffer("std", 255 * model.std.detach().clone())
        same = model.input_size in (None, model.image_size)
        self.side = None if same else model.input_size

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, C)``."""
        if self.preprocess:
            images = (images.to(torch.float32) - self.mean) / self.std
        if self.side is not None:  # after the normalisation, with which it commutes
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        logits: Tensor = self.model.classifier(self.model.embed(images)[0])
        return logits

    def examples(self, number: int, seed: int = 0) -> Tensor:
        """Return random images in the form that :meth:`forward` takes."""
        size = self.model.image_size
        assert size is not None  # every model that can be saved has one
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (number, 3, size, size), generator=generator, dtype=torch.uint8)
        return pixels if self.preprocess else (pixels - self.mean) / self.std


def open_student(folder: Path) -> Backbone:
    """Load the student of a run, on the CPU and in evaluation mode.

    Raises:
        RunError: The folder holds no student.
        ModelError: The student is damaged.
    """
    run_folder = RunFolder(folder)
    if run_folder.trained_nothing:
        raise RunError(f"{folder} holds no student: its method trains none, so there is nothing to export")
    if not run_folder.has_student:
        raise RunError(f"{folder} holds no student: there is no model.json; give the folder of a finished run")
    return load_model(folder)


def metadata_of(model: Backbone, preprocess: bool) -> dict[str, Any]:
    """Return what a program must know to preprocess images for a student and to read its logits."""
    return {
        "classes": list(model.class_names or ()),
        "size": model.image_size,
        "mean": model.mean.flatten().tolist(),
        "std": model.std.flatten().tolist(),
        "interpolation": "bilinear",
        "crop": "center-square",
        "preprocess": preprocess,
        "grey_range": None if model.grey_range is None else list(model.grey_range),
        "architecture": model.architecture,
    }


def as_texts(metadata: dict[str, Any]) -> dict[str, str]:
    """Write each value as JSON."""
    return {name: json.dumps(value) for name, value in metadata.items()}


def check_parity(deployed: Deployed, run: Any, what: Path) -> float:
    """Compare an exported file with torch at the batch sizes :data:`BATCHES`.

    Args:
        deployed: The student.
        run: Function from images ``(N, 3, S, S)`` to logits ``(N, C)``, both tensors.
        what: The file, for the message.

    Returns:
        The largest absolute difference of the logits.

    Raises:
        RunError: It is above :data:`TOLERANCE`, or an image gets another class.
    """
    worst = 0.0
    for number in BATCHES:
        images = deployed.examples(number, seed=number)
        with torch.no_grad():
            expected = deployed(images)
        found = run(images)
        difference = (found - expected).abs().max().item()
        # A tie within the tolerance is no difference.
        chosen = expected.gather(1, found.argmax(1, keepdim=True)).squeeze(1)
        same = bool((expected.amax(1) - chosen <= TOLERANCE).all())
        if not difference <= TOLERANCE or not same:
            raise RunError(
                f"{what} differs from torch by {difference:.2g} in the logits of a batch of {number} (allowed: "
                f"{TOLERANCE:g}); do not use it, and report the architecture '{deployed.model.architecture}'"
            )
        worst = max(worst, difference)
    return worst
