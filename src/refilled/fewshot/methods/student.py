"""One small network per task, distilled from the frozen model by a method of :mod:`refilled.methods`.

With the method ``refilled`` this is the few-shot experiment of the ReFilled paper (section 5.3, Tables 7 and S3).

References:
    Ye, Lu and Zhan, Distilling Cross-Task Knowledge via Relationship Matching, CVPR 2020.
"""

from pathlib import Path

from refilled.errors import ModelError
from refilled.fewshot.bank import Bank, Learner
from refilled.fewshot.students import (
    Classifier,
    Norm,
    Stages,
    StudentPrecision,
    StudentRecipe,
    student_learner,
    with_classifier,
)
from refilled.models import Backbone, create_model, load_model


def student(
    bank: Bank,
    stages: Stages,
    *,
    student: str = "convnet4",
    steps: int = 100,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    copies: int | None = None,
    shots: int = 10,
    views: int = 8,
    classifier: Classifier = "random",
    probe_c: float = 10.0,
    norm: Norm = "batch",
    together: int | None = None,
    precision: StudentPrecision = "auto",
    seed: int = 0,
) -> Learner:
    """Train a student for each task.

    Args:
        bank: The images, with the teacher as the frozen model.
        stages: The stages of the distillation method, for a student and the teacher.
        student: An architecture, trained from scratch, or the folder of a model from which each student starts, such as
            a model of the seen classes.
        steps: See :class:`~refilled.fewshot.students.StudentRecipe`.
        lr: See :class:`~refilled.fewshot.students.StudentRecipe`.
        momentum: See :class:`~refilled.fewshot.students.StudentRecipe`.
        weight_decay: See :class:`~refilled.fewshot.students.StudentRecipe`.
        copies: See :class:`~refilled.fewshot.students.StudentRecipe`.
        shots: See :class:`~refilled.fewshot.students.StudentRecipe`.
        views: See :class:`~refilled.fewshot.students.StudentRecipe`.
        classifier: See :class:`~refilled.fewshot.students.StudentRecipe`.
        probe_c: See :class:`~refilled.fewshot.students.StudentRecipe`.
        norm: See :class:`~refilled.fewshot.students.StudentRecipe`.
        together: See :class:`~refilled.fewshot.students.StudentRecipe`.
        precision: See :class:`~refilled.fewshot.students.StudentRecipe`.
        seed: See :class:`~refilled.fewshot.students.StudentRecipe`.
    """
    recipe = StudentRecipe(
        steps=steps,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        copies=copies,
        shots=shots,
        views=views,
        classifier=classifier,
        probe_c=probe_c,
        norm=norm,
        together=together,
        precision=precision,
        seed=seed,
    )
    if Path(student).is_dir():
        start = load_model(Path(student))
        return student_learner(bank, lambda classes: with_classifier(start, classes), stages, recipe)
    if "/" in student and not student.startswith("timm/"):
        raise ModelError(f"there is no folder {student} with a model for the students to start from")
    return student_learner(bank, lambda classes: _fresh(student, classes, bank), stages, recipe)


def _fresh(architecture: str, classes: int, bank: Bank) -> Backbone:
    model = create_model(architecture, classes, image_size=bank.pixels.shape[-1])
    model.class_names = tuple(map(str, range(classes)))
    return model
