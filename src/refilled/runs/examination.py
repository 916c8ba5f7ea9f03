"""What a teacher knows of the classes at hand, found from a sample before training, and whether it is ignored."""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from refilled.data import Split
from refilled.files import read_fields, write_atomic
from refilled.losses.trust import held_out_information, is_at_chance, knows_less, label_information
from refilled.models import Backbone
from refilled.runs.prepared import Prepared
from refilled.runs.scoring import finite_embedding

_CLASSES, _PER_CLASS = 20, 25  # of the sample
_ENOUGH = 5  # images per class, if some classes have this many
_FEWEST = 12  # images; of two classes of 5, a shuffle is as good as the labels in every 126th case
_FEWEST_HELD_OUT = 40
_NEXT_TO_NOTHING = 0.02  # untrained networks reach 0.009 to 0.022 on photographs (CUB, CIFAR-100, Tiny-ImageNet)
_WELL_KNOWN = 0.2  # a teacher that knows so much is found to be better than chance on 40 held-out images
_SIDE = 32  # pixels to which larger images are averaged down


@dataclass(frozen=True)
class Verdict:
    """What is thought of a teacher before training; a resumed run keeps it.

    Attributes:
        ignored: Whether the student is trained without the teacher.
        notes: What a user should know.
    """

    ignored: bool
    notes: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read the verdict in a run's folder; None where the run has none yet."""
        path = folder / "teacher.json"
        if not path.exists():
            return None
        return read_fields(cls, path)

    def save(self, folder: Path) -> None:
        """Write the verdict to a run's folder."""
        write_atomic(folder / "teacher.json", (json.dumps(asdict(self), indent=2) + "\n").encode())


def verdict_on(prepared: Prepared, folder: Path, device: torch.device) -> Verdict:
    """Return the verdict in the run's folder, or judge the teacher and write it there."""
    found = Verdict.load(folder)
    if found is None:
        found = judge(prepared, device)
        found.save(folder)
    return found


def judge(prepared: Prepared, device: torch.device) -> Verdict:
    """Warn of a teacher that has nothing to teach, by a sample of the training images and of the held-out ones.

    It has nothing to teach if its embedding tells the classes apart no better than chance, or less well than the
    pixels themselves, or only in the images that are trained on. A run with ``guard`` then ignores it. The test images
    are not looked at.
    """
    fault = None if prepared.teacher is None else _fault(prepared.teacher, prepared, device)
    if fault is None:
        return Verdict(ignored=False, notes=())
    ignored = prepared.run.guard and any(stage.needs_teacher for stage in prepared.stages)
    ending = ": it will be ignored" if ignored else ". Such a teacher can hardly help"
    return Verdict(ignored, (f"the teacher tells your classes apart {fault}{ending}",))


def _fault(teacher: Backbone, prepared: Prepared, device: torch.device) -> str | None:
    train = _sample(prepared.task.train)
    if len(train) < _FEWEST or train.labels.unique().numel() < 2:
        return None
    embedding, labels = finite_embedding(teacher, train, device), train.labels
    fault = fault_in(embedding, pixels_of(train), labels)
    if fault is not None:
        return fault
    known = label_information(embedding, labels)
    held_out = _sample(prepared.task.val, labels.unique())
    if known < _WELL_KNOWN or len(held_out) < _FEWEST_HELD_OUT:
        return None
    unseen = finite_embedding(teacher, held_out, device)
    on_held_out = partial(held_out_information, embedding, labels, unseen)
    if is_at_chance(on_held_out, held_out.labels):
        return (
            f"in the training images (label information {known:.2f}), but not in the held-out images "
            f"({on_held_out(held_out.labels):.2f}), as if it had learned these very images by heart"
        )
    return None


def fault_in(embedding: Tensor, pixels: Tensor, labels: Tensor) -> str | None:
    """Return how badly an embedding tells the classes apart, if that is no better than chance or than the pixels.

    Args:
        embedding: The teacher's embedding ``(N, d)`` of training images.
        pixels: The images themselves ``(N, e)``; see :func:`pixels_of`.
        labels: Class ids ``(N,)``.
    """
    known = label_information(embedding, labels)
    if is_at_chance(partial(label_information, embedding), labels):
        return f"no better than chance (label information {known:.2f})"
    if known < _NEXT_TO_NOTHING:
        return f"hardly better than chance (label information {known:.2f})"
    if knows_less(embedding, pixels, labels):
        of_pixels = label_information(pixels, labels)
        return f"less well than the plain pixels do (label information {known:.2f}, of the pixels {of_pixels:.2f})"
    return None


def _sample(images: Split, classes: Tensor | None = None) -> Split:
    """Choose a few images of each of some classes: of those given, or of some that are spread evenly over all."""
    labels = images.labels
    if classes is None:
        classes, counts = labels.unique(return_counts=True)
        classes = classes[counts >= max(2, min(_ENOUGH, int(counts.max())))] if len(classes) else classes
        if len(classes) > _CLASSES:
            classes = classes[torch.linspace(0, len(classes) - 1, _CLASSES).round().long()]
    chosen = [(labels == number).nonzero().flatten()[:_PER_CLASS] for number in classes]
    rows = torch.cat([torch.empty(0, dtype=torch.long), *chosen])
    return Split(images.pixels[rows], labels[rows], [images.sources[row] for row in rows.tolist()])


def pixels_of(images: Split) -> Tensor:
    """Return the images themselves as an embedding ``(N, d)``; large ones are averaged down."""
    pixels = images.pixels[torch.arange(len(images))].float()
    if max(pixels.shape[-2:]) > _SIDE:
        pixels = F.adaptive_avg_pool2d(pixels, _SIDE)
    return pixels.flatten(1)
