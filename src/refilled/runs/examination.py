"""What a teacher knows of the classes at hand, found from a sample before training."""

import torch
from torch import Tensor

from refilled.data import Split
from refilled.losses.trust import is_at_chance, label_information
from refilled.runs.prepared import Prepared
from refilled.runs.scoring import finite_embedding

_CLASSES, _PER_CLASS = 20, 10  # of the sample
_NEXT_TO_NOTHING = 0.02  # untrained networks reach 0.009 to 0.022 on photographs (CUB, CIFAR-100, Tiny-ImageNet)


def label_notes(prepared: Prepared, device: torch.device) -> tuple[str, ...]:
    """Warn of a teacher that knows nothing of the classes at hand, by a sample of the training images."""
    teacher, images = prepared.teacher, prepared.task.train
    rows = _sample(images.labels)
    labels = images.labels[rows]
    if teacher is None or labels.unique().numel() < 2:
        return ()
    sample = Split(images.pixels[rows], labels, [images.sources[row] for row in rows.tolist()])
    embedding = finite_embedding(teacher, sample, device)
    known = label_information(embedding, labels)
    if is_at_chance(embedding, labels):
        what = "no more than chance does"
    elif known < _NEXT_TO_NOTHING:
        what = "next to nothing"
    else:
        return ()
    return (
        f"the teacher's embedding says {what} about the classes: on {len(rows)} of the training images it takes a "
        f"share of {known:.3f} of the labels' entropy away. Such a teacher can hardly help",
    )


def _sample(labels: Tensor) -> Tensor:
    """Choose a few images of each of some classes, spread evenly over the classes."""
    classes, counts = labels.unique(return_counts=True)
    classes = classes[counts >= _PER_CLASS // 2]
    if len(classes) == 0:
        return torch.empty(0, dtype=torch.long)
    chosen = classes[torch.linspace(0, len(classes) - 1, min(_CLASSES, len(classes))).round().long()]
    return torch.cat([(labels == number).nonzero().flatten()[:_PER_CLASS] for number in chosen])
