"""Predictions, scores and embeddings by the network of a finished run."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refilled.config import Run
from refilled.data import GreyRange, Task
from refilled.data.several import Several
from refilled.errors import RefilledError, RunError
from refilled.files import read_tensors
from refilled.methods import load_method
from refilled.models import Backbone, embedded_folder, load_model
from refilled.models.weights import load_weights
from refilled.runs.classifying import Classifier
from refilled.runs.environment import find_device
from refilled.runs.folder import RunFolder
from refilled.runs.images import ImageRecord
from refilled.runs.prepared import load_task_of, load_teacher_of, load_teachers_of
from refilled.runs.result import Result
from refilled.runs.scoring import accuracy_by_class, balanced_accuracy, finite_embedding
from refilled.stages import Readout
from refilled.training.evaluation import accuracy, nearest_center_accuracy, predict, predict_classes
from refilled.words import count_of, plural

Classified = tuple[list[tuple[Path, dict[str, float]]], list[tuple[Path, str]]]
"""Each image's probability of each class, and for images that cannot be read the reason."""


def evaluate(folder: Path, task: str | None = None, data_root: str | None = None) -> dict[str, Any]:
    """Score a student on the test part of its own task, or of another one whose classes it knows.

    The image size, the normalisation, and the classes and their order are those of the student. Labels are matched to
    its classes by name.

    Args:
        folder: The run's folder.
        task: Another task; None for the run's own.
        data_root: Where data sets lie; None for where the run found them.

    Returns:
        ``task``, ``images`` (how many were scored), ``accuracy`` (percent; None without images), ``balanced_accuracy``
        (mean over classes), ``class_accuracies`` by name, and ``notes`` about these numbers, such as images that were
        trained on.

    Raises:
        RunError: The folder holds no student, or the task has classes that the student does not know.
        TaskError: The images cannot be loaded.
    """
    model = _load_student(folder)
    data = load_task_of(_scored_run(RunFolder(folder).run(), model, task, data_root), _grey_range_of(model))
    names = model.class_names
    assert names is not None  # every student has them
    unknown = [name for name in data.classes if name not in names]
    if unknown:
        raise RunError(
            f"{data.name} has classes that the student in {folder} does not know: {Several.of(unknown)}. Select the "
            "others, as in TASK:NAME,NAME"
        )
    labels = torch.tensor([names.index(name) for name in data.classes])[data.test.labels]
    found = predict_classes(model, data.test.pixels)
    by_class = accuracy_by_class(names, found, labels)
    return {
        "task": data.name,
        "images": len(data.test),
        "accuracy": accuracy(found, labels) if len(labels) else None,
        "balanced_accuracy": balanced_accuracy(by_class),
        "class_accuracies": by_class,
        "notes": [*_notes(ImageRecord.load(folder), data, own=task is None), *_unscored(names, labels)],
    }


def _scored_run(run: Run, model: Backbone, task: str | None, data_root: str | None) -> Run:
    """Describe the images to be scored. Of another task, only the test part matters."""
    run = replace(run, data_root=data_root or run.data_root, image_size=model.image_size)
    return run if task is None else replace(run, task=task, shots=None, val=0.0)


def _notes(record: ImageRecord | None, data: Task, own: bool) -> list[str]:
    if record is None:
        return []
    changes = record.changes(data) if own else None
    trained_on = record.trained_on(data.test)
    notes = [f"the images are not those of the run: {changes}"] if changes else []
    if trained_on:
        notes.append(
            f"{trained_on} of {count_of(len(data.test), 'scored image')} {plural(trained_on, 'was', 'were')} trained "
            "on: the accuracy is too high"
        )
    return notes


def _unscored(names: tuple[str, ...], labels: Tensor) -> list[str]:
    missing = [name for place, name in enumerate(names) if place not in set(labels.tolist())]
    return [f"no images of {count_of(len(missing), 'class')}: {Several.of(missing)}"] if missing else []


def teacher_accuracies(folder: Path) -> list[float]:
    """Score each teacher of a run as a nearest-class-mean classifier of the run's own images, in percent.

    This measures how much a teacher can teach, because its embedding is used as it is, with training images only for
    the class means.
    """
    task, found = task_of(folder), []
    for teacher in teachers_of(folder, task.image_size).values():
        train, test = (finite_embedding(teacher, split) for split in (task.train, task.test))
        mean = train.mean(0)  # the common part of all embeddings has no information
        found.append(nearest_center_accuracy(train - mean, task.train.labels, test - mean, task.test.labels))
    return found


def task_of(folder: Path) -> Task:
    """Load the images of a run's task."""
    return load_task_of(RunFolder(folder).run())


def teachers_of(folder: Path, image_size: int) -> dict[str, Backbone]:
    """Load the teachers of a run by name, for images of this size in pixels."""
    run = RunFolder(folder).run()
    return dict(zip(run.teachers, map(_placed, load_teachers_of(run, image_size)), strict=True))


def teacher_task_of(folder: Path) -> Task | None:
    """Load the training images of the first teacher of a run for which they are known.

    None if the run has no teacher, if no record names the images, or if they no longer exist.
    """
    for teacher in RunFolder(folder).run().teachers:
        trained = RunFolder(embedded_folder(teacher) or Path(teacher))
        try:
            if trained.begun:
                return load_task_of(trained.run())
        except RefilledError:  # the page does not need them
            continue
    return None


def network_of(folder: Path, stage: str | None = None) -> Backbone:
    """Load the network that a finished run scored, from the end or from after an earlier stage.

    It is the run's student, or the teacher if the method trained no student.

    Raises:
        RunError: The run has no such stage.
        ModelError: The folder holds no student.
    """
    run_folder = RunFolder(folder)
    if run_folder.trained_nothing:
        return _placed(load_teacher_of(run_folder.run(), Result.load(folder).data["image_size"]))
    student = load_model(folder)
    if stage is not None:
        path = run_folder.stage(stage)
        if not path.exists():
            raise RunError(f"{folder} does not hold the student after a stage '{stage}'")
        load_weights(student, read_tensors(path), str(path))
    return _placed(student)


def readout_classes(folder: Path, task: Task, teacher: Backbone) -> Tensor:
    """Classify the scored images by the readout of a run that trained nothing, to class ids ``(N,)``, as it did.

    Args:
        folder: The run's folder.
        task: Its task.
        teacher: Its teacher.
    """
    run = RunFolder(folder).run()
    readout = load_method(run.method).build(None, teacher, run.settings)
    assert isinstance(readout, Readout)  # or it would have a student
    scored = task.test if run.score == "test" else task.val
    train, embedding = (finite_embedding(teacher, split) for split in (task.train, scored))
    return readout.classify(train, task.train.labels, embedding)


def open_classifier(folder: Path) -> Classifier:
    """Load the student of a run's folder as a classifier of image files.

    Raises:
        RefilledError: The folder holds no student.
    """
    return classifier_of(_load_student(folder))


def classifier_of(model: Backbone) -> Classifier:
    """Return a loaded student as a classifier of image files."""
    assert model.image_size is not None  # every model that can be saved has one
    assert model.class_names is not None  # every student has them
    return Classifier(
        lambda pixels: predict(model, pixels, parts=("logits",)).logits,
        tuple(model.class_names),
        model.image_size,
        _grey_range_of(model),
    )


def classify_by(classifier: Classifier, images: Iterable[Path]) -> Classified:
    """Return each image's probability of each class, and for images that cannot be read the reason.

    All are held in memory; :meth:`Classifier.stream` gives them batch by batch.

    Args:
        classifier: A loaded student.
        images: Image files, or folders whose images, at any depth, are taken.

    Raises:
        TaskError: There is no image.
    """
    readable: list[tuple[Path, dict[str, float]]] = []
    unreadable: list[tuple[Path, str]] = []
    for batch in classifier.stream(images):
        rows = (dict(zip(classifier.classes, row, strict=True)) for row in batch.probabilities.tolist())
        readable += zip(batch.images, rows, strict=True)
        unreadable += batch.unreadable
    return readable, unreadable


def _load_student(folder: Path) -> Backbone:
    run_folder = RunFolder(folder)
    if run_folder.trained_nothing:
        raise RunError(
            f"{folder} holds no student: '{run_folder.run().method}' reads the embedding of its teacher and trains "
            "nothing; its accuracy is in result.json"
        )
    return _placed(load_model(folder))


def _grey_range_of(model: Backbone) -> GreyRange | None:
    """Return the black and white of a student's training images with more than 8 bits per channel, if they had any."""
    return None if model.grey_range is None else GreyRange(*model.grey_range)


def _placed(model: Backbone) -> Backbone:
    """Move a model to the accelerator, if there is one."""
    return model.to(find_device("auto"))
