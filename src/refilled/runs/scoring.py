"""Scoring of a trained student, once, at the end of a run."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refilled.config import Run
from refilled.data import Split, Task
from refilled.files import read_tensors
from refilled.models import Backbone, refuse_non_finite
from refilled.models.weights import load_weights
from refilled.runs.environment import device_name, versions
from refilled.runs.folder import RunFolder
from refilled.runs.prepared import Prepared
from refilled.runs.result import Result
from refilled.runs.teachers import about_teachers
from refilled.training.distributed import ALONE, World
from refilled.training.evaluation import (
    accuracy,
    class_accuracies,
    embed,
    nearest_center_accuracy,
    predict_classes_twice,
)
from refilled.words import count_of

_FEW_STEPS = 300  # of optimisation; fewer are noted
_IMBALANCED = 5  # times as many images in the largest class as in the smallest


def measure(prepared: Prepared, folder: RunFolder, seconds: float, world: World, notes: Sequence[str] = ()) -> Result:
    """Score the student on the images that the result is about; nothing else reads them.

    Args:
        prepared: The run.
        folder: The run's folder, with the student at the end of each stage.
        seconds: Duration of training.
        world: The processes of the run.
        notes: Messages about training for a reader of the result.
    """
    run, task, student = prepared.run, prepared.task, prepared.student
    device, labels = torch.device(run.device), prepared.scored.labels
    if prepared.readout is None:
        predicted, nearest = predict_classes_twice(student, task.train, prepared.scored.pixels, device, world)
        ncm_accuracy = accuracy(nearest, labels)
    else:
        train, scored = (finite_embedding(student, split, device, world) for split in (task.train, prepared.scored))
        predicted = prepared.found = prepared.readout.classify(train, task.train.labels, scored)
        ncm_accuracy = nearest_center_accuracy(train, task.train.labels, scored, labels)
    by_class = accuracy_by_class(task.classes, predicted, labels)
    return Result(
        accuracy=accuracy(predicted, labels),
        balanced_accuracy=balanced_accuracy(by_class),
        ncm_accuracy=ncm_accuracy,
        class_accuracies=by_class,
        stages=_measure_stages(prepared, folder, world),
        seconds=seconds,
        parameters=sum(p.numel() for p in student.parameters()),
        data={
            "task": task.name,
            "fingerprint": task.fingerprint,
            "images": {"train": len(task.train), "val": len(task.val), "test": len(task.test)},
            "scored": run.score,
            "image_size": task.image_size,
            "grey_range": task.grey_range,
            "skipped": [list(pair) for pair in task.skipped],
            "ignored": task.ignored.record(),
            "copies": task.copies.record(),
            "left_out": task.left_out.record(),
            "notes": [
                *task.notes,
                *prepared.notes,
                *notes,
                *imbalance(task),
                *_unseen(prepared),
                *(_few_steps(run, task) if prepared.stages else []),
            ],
            **_unlabelled(run, task),
        },
        teacher=about_teachers(prepared),
        versions=versions(),
        hardware={
            "device": device_name(device),
            "processes": world.size,
            "threads": run.threads,
            "precision": run.precision,
        },
    )


def _measure_stages(prepared: Prepared, folder: RunFolder, world: World) -> dict[str, dict[str, float]]:
    """Score the student at the end of each stage except the last."""
    student, task, scored = prepared.student, prepared.task, prepared.scored
    measures = {}
    final = {name: value.clone() for name, value in student.state_dict().items()}
    for stage in prepared.stages[:-1]:
        weights = world.lead(partial(_weights_in, folder.stage(stage.name)))
        if weights is not None:
            load_weights(student, weights, str(folder.stage(stage.name)))
            _, nearest = predict_classes_twice(student, task.train, scored.pixels, prepared.run.device, world)
            measures[stage.name] = {"ncm_accuracy": accuracy(nearest, scored.labels)}
    student.load_state_dict(final)
    return measures


def _weights_in(path: Path) -> dict[str, Tensor] | None:
    return read_tensors(path) if path.exists() else None


def _unlabelled(run: Run, task: Task) -> dict[str, Any]:
    """Return the source, the number and the fingerprint of the unlabelled images; empty if there are none."""
    if task.unlabelled is None:
        return {}
    digest = task.unlabelled_fingerprint
    return {"unlabelled": {"source": run.unlabelled, "images": len(task.unlabelled), "fingerprint": digest}}


def _unseen(prepared: Prepared) -> list[str]:
    """Return a note if there are unlabelled images but no loss uses them."""
    if prepared.task.unlabelled is None or any(stage.sees_unlabelled for stage in prepared.stages):
        return []
    method = "vanilla" if prepared.ignores_teacher else prepared.run.method
    return [f"the method '{method}' has no use for unlabelled images: none were seen"]


def _few_steps(run: Run, task: Task) -> list[str]:
    images = len(task.train), 0 if task.unlabelled is None else len(task.unlabelled)
    steps = run.epochs_over(*images) * run.steps_over(*images)
    if steps >= _FEW_STEPS:
        return []
    few = count_of(steps, "step of optimisation is", "steps of optimisation are")
    return [f"{few} few; more --epochs or a smaller --batch-size should help"]


def accuracy_by_class(names: Sequence[str], predicted: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Return the accuracy in percent within each class, by name; None for a class without images."""
    accuracies = class_accuracies(predicted, labels, len(names))
    return {name: None if a != a else a for name, a in zip(names, accuracies, strict=True)}  # JSON has no NaN


def balanced_accuracy(class_accuracies: Mapping[str, float | None]) -> float | None:
    """Return the mean accuracy in percent of the classes with images; None if there are none."""
    known = [value for value in class_accuracies.values() if value is not None]
    return sum(known) / len(known) if known else None


def imbalance(task: Task) -> list[str]:
    """Return a note if the largest class has more than 5 times the training images of the smallest."""
    counts = torch.bincount(task.train.labels, minlength=len(task.classes))
    most, least = int(counts.argmax()), int(counts.argmin())
    if counts[most] <= _IMBALANCED * counts[least]:
        return []
    return [
        f"the classes are imbalanced: {counts[most]} training images of '{task.classes[most]}', {counts[least]} of "
        f"'{task.classes[least]}'. Read the balanced accuracy, the mean over classes, beside the accuracy; "
        "--balance logits raises it"
    ]


def finite_embedding(
    teacher: Backbone, images: Split, device: torch.device | str | None = None, world: World = ALONE
) -> Tensor:
    """Return a teacher's embeddings ``(N, d)`` of images.

    Raises:
        ModelError: An embedding is not finite. The message names the image.
    """
    embedding = embed(teacher, images.pixels, device, world)
    refuse_non_finite(embedding, images.sources)
    return embedding
