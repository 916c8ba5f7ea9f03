"""A small network for each task, trained with the help of the frozen model by a method of :mod:`refilled.methods`.

With the method ``refilled`` it is what the ReFilled paper does for few and middle shots (section 5.3, Tables 7 and S3).

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
        student: An architecture, which starts from scratch, or the folder of a model, say of the seen classes, from
            which each student starts.
        steps: See :class:`~refilled.fewshot.students.StudentRecipe`, as for all that follow.
        lr: Likewise.
        momentum: Likewise.
        weight_decay: Likewise.
        copies: Likewise.
        shots: Likewise.
        views: Likewise.
        classifier: Likewise.
        probe_c: Likewise.
        norm: Likewise.
        together: Likewise.
        precision: Likewise.
        seed: Likewise.
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
