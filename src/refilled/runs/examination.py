"""Examination of a teacher before training: whether its embedding separates the classes, from a sample of images."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from refilled.data import Split, spread
from refilled.files import read_fields, write_atomic
from refilled.losses.trust import held_out_information, is_at_chance, knows_less, label_information
from refilled.models import Backbone, classes_of_folder, starts_from_weights
from refilled.runs.prepared import Prepared
from refilled.runs.scoring import finite_embedding

_CLASSES, _PER_CLASS = 20, 25  # size of the sample
SAMPLE_IMAGES = _CLASSES * _PER_CLASS
"""Largest number of training images by which a teacher is judged."""
_ENOUGH = 5  # minimum number of images per class, if any class has this many
_FEWEST = 12  # images; with two classes of 5, one shuffle in 126 is equivalent to the labels
_FEWEST_HELD_OUT = 40  # images
_NEXT_TO_NOTHING = 0.02  # untrained networks reach 0.009 to 0.022 on photographs (CUB, CIFAR-100, Tiny-ImageNet)
_WELL_KNOWN = 0.2  # from this label information on, 40 held-out images suffice to show that it is above chance
_BEYOND_THE_STUDENT = 0.5  # share of what a student's weights leave unexplained; 0.40 and less do harm (docs/log.md)
_SIDE = 32  # pixels; larger images are averaged down to this side length


@dataclass(frozen=True)
class Verdict:
    """The result of the examination of a teacher. A resumed run keeps it.

    Attributes:
        ignored: Whether the student is trained without any teacher.
        notes: Messages for the user.
        of_each: Of several teachers, whether each is ignored and its label information on the sample. Empty for one.
    """

    ignored: bool
    notes: tuple[str, ...]
    of_each: tuple[tuple[bool, float | None], ...] = ()

    @property
    def ignores(self) -> tuple[bool, ...]:
        """Whether each teacher is ignored."""
        return tuple(ignored for ignored, _ in self.of_each) or (self.ignored,)

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read the verdict from a run's folder; None if there is none yet."""
        path = folder / "teacher.json"
        if not path.exists():
            return None
        return read_fields(cls, path)

    def save(self, folder: Path) -> None:
        """Write the verdict to a run's folder."""
        content = {name: value for name, value in asdict(self).items() if name != "of_each" or value}
        write_atomic(folder / "teacher.json", (json.dumps(content, indent=2) + "\n").encode())


def verdict_on(prepared: Prepared, folder: Path, device: torch.device) -> Verdict:
    """Return the verdict in the run's folder, or judge the teacher and write it there."""
    verdict = Verdict.load(folder)
    if verdict is None:
        verdict = judge(prepared, device)
        verdict.save(folder)
    return verdict


def judge(prepared: Prepared, device: torch.device) -> Verdict:
    """Examine a teacher on a sample of the training images and of the held-out images.

    The verdict is negative if the teacher's embedding separates the classes no better than chance, less well than the
    pixels, not clearly better than a student that starts from weights, or only on training images. A run with ``guard``
    then ignores the teacher; otherwise there is a warning. The test images are not used. Of several teachers, each is
    judged alone.

    Args:
        prepared: The run.
        device: The device that the teachers run on.
    """
    can_ignore = prepared.run.guard and any(stage.needs_teacher for stage in prepared.stages)
    ending = ": it will be ignored" if can_ignore else ". Such a teacher can hardly help"
    several = len(prepared.teachers) > 1
    train = _sample(prepared.task.train)
    own = cache(partial(_embedding_before_training, prepared, train, device))  # once for all teachers, if at all
    notes, of_each = [], []
    for name, teacher in zip(prepared.run.teachers, prepared.teachers, strict=False):
        teacher.to(device)
        fault, known = _fault(teacher, own, train, prepared, device)
        if fault is not None:
            notes.append(f"the teacher{f' {name}' if several else ''} tells your classes apart {fault}{ending}")
        of_each.append((can_ignore and fault is not None, known))
    ignored = len(of_each) > 0 and all(out for out, _ in of_each)
    return Verdict(ignored, tuple(notes), tuple(of_each) if several else ())


def _fault(
    teacher: Backbone, own: Callable[[], Tensor | None], train: Split, prepared: Prepared, device: torch.device
) -> tuple[str | None, float | None]:
    """Return why a teacher has nothing to teach, if so, and its label information on the sample."""
    if len(train) < _FEWEST or train.labels.unique().numel() < 2:
        return None, None
    embedding, labels = finite_embedding(teacher, train, device), train.labels
    known = label_information(embedding, labels)
    fault = fault_in(embedding, pixels_of(train), labels)
    if fault is None and (of_student := own()) is not None:
        fault = fault_beside_student(embedding, of_student, labels)
    return fault or _fault_beyond(embedding, labels, known, teacher, prepared, device), known


def _fault_beyond(
    embedding: Tensor, labels: Tensor, known: float, teacher: Backbone, prepared: Prepared, device: torch.device
) -> str | None:
    """Return a phrase if an embedding separates the classes of the sample, but not those of held-out images."""
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
    """Return a phrase if an embedding separates the classes no better than chance, or less well than the pixels.

    Args:
        embedding: The teacher's embedding ``(N, d)`` of training images.
        pixels: The pixels of the images as an embedding ``(N, e)``; see :func:`pixels_of`.
        labels: Class ids ``(N,)``.

    Returns:
        How well it separates them, as the end of a sentence; None if there is no fault.
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


def _embedding_before_training(prepared: Prepared, images: Split, device: torch.device) -> Tensor | None:
    """Return the embedding of images by the weights that the student starts from.

    None if it starts from none, or from those of a run on some of the same classes, which may know the images by heart.
    """
    run = prepared.run
    if not starts_from_weights(run.student, run.pretrained):
        return None
    if set(classes_of_folder(run.student)) & set(prepared.task.classes):
        return None
    return finite_embedding(prepared.student.to(device), images, device)


def fault_beside_student(embedding: Tensor, own: Tensor, labels: Tensor) -> str | None:
    """Return a phrase if a teacher separates the classes hardly better than the weights that a student starts from.

    Training teaches the student more than its weights know. So a teacher must explain half of what these leave
    unexplained of the labels, and more with statistical certainty.

    Args:
        embedding: The teacher's embedding ``(N, d)`` of training images.
        own: The student's embedding ``(N, e)`` of these images, before training.
        labels: Class ids ``(N,)``.
    """
    known, of_student = label_information(embedding, labels), label_information(own, labels)
    if known - of_student >= _BEYOND_THE_STUDENT * (1 - of_student) and knows_less(own, embedding, labels):
        return None
    how = "no" if known <= of_student else "hardly"
    return (
        f"{how} better than your student does before training (label information {known:.2f}, of the student "
        f"{of_student:.2f})"
    )


def _sample(images: Split, classes: Tensor | None = None) -> Split:
    """Return at most 25 images per class, of the given classes or of 20 classes spread evenly over all."""
    labels = images.labels
    if classes is None:
        classes, counts = labels.unique(return_counts=True)
        classes = classes[counts >= max(2, min(_ENOUGH, int(counts.max())))] if len(classes) else classes
        classes = classes[spread(len(classes), _CLASSES)]
    chosen = [(labels == number).nonzero().flatten()[:_PER_CLASS] for number in classes]
    rows = torch.cat([torch.empty(0, dtype=torch.long), *chosen])
    return Split(images.pixels[rows], labels[rows], [images.sources[row] for row in rows.tolist()])


def pixels_of(images: Split) -> Tensor:
    """Return the pixels as an embedding ``(N, d)``; large images are averaged down."""
    pixels = images.pixels[torch.arange(len(images))].float()
    if max(pixels.shape[-2:]) > _SIDE:
        pixels = F.adaptive_avg_pool2d(pixels, _SIDE)
    return pixels.flatten(1)
