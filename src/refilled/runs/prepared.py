"""A run whose images, networks and method are loaded and checked before training."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn

from refilled.config import Run, names_in
from refilled.data import GreyRange, Split, Task, absolute_task_text, channel_statistics, data_folder, load_task, spread
from refilled.errors import RunError
from refilled.losses.imbalance import BalancedCrossEntropyLoss, counts_of
from refilled.methods import load_method
from refilled.methods.vanilla import vanilla
from refilled.models import (
    PROBE_IMAGES,
    Backbone,
    create_model,
    create_student,
    load_teacher,
    probe,
    starts_from_weights,
    trainable_copy,
)
from refilled.runs.determinism import use_machine
from refilled.runs.environment import find_device
from refilled.stages import FineTuning, Readout, Stage
from refilled.training.evaluation import embed
from refilled.training.precision import resolve_precision
from refilled.training.teacher_cache import fingerprint


def resolve(run: Run) -> Run:
    """Fill in what depends on the machine and on the method's defaults, so that the run's folder records it.

    Raises:
        RefilledError: The device cannot be used here, the method or a parameter of it does not exist, or the method
            needs a teacher and none is named.
    """
    device = find_device(run.device)
    precision = resolve_precision(run.precision, device)
    method = load_method(run.method)
    student = run.student if method.takes_student else None
    settings = method.settle(run.settings)
    method.check_named(run.teachers)
    threads = run.threads or torch.get_num_threads()
    return replace(run, student=student, device=device.type, precision=precision, settings=settings, threads=threads)


def with_absolute_paths(run: Run) -> Run:
    """Make the paths that a run names absolute.

    Paths with environment variables do not change.

    Raises:
        TaskError: There is no such data set.
    """
    root = None if run.data_root is None else Path(run.data_root).expanduser().absolute()
    return replace(
        run,
        task=absolute_task_text(run.task, data_folder(root)),
        data_root=None if root is None else str(root),
        teacher=tuple(map(_absolute, run.teachers)),
        student=_absolute(run.student) if run.student is not None and _has_path(run.student) else run.student,
        method=_absolute(run.method) if runs_code(run.method) else run.method,
    )


def _has_path(student: str) -> bool:
    return starts_from_weights(student) or runs_code(student)


def runs_code(name: str | Sequence[str] | None) -> bool:
    """Return whether a name of teachers, a student or a method is a Python file, which loading executes."""
    return any(re.search(r"\.py(:|$)", each) for each in names_in(name))


def _absolute(name: str) -> str:
    """Make the path in ``FOLDER``, ``ARCHITECTURE:FILE`` or ``FILE.py:FUNCTION`` absolute."""
    if "$" in name:
        return name
    file = re.fullmatch(r"(.+?\.py)((?::.*)?)", name, re.DOTALL)
    if file:
        return f"{Path(file[1]).expanduser().absolute()}{file[2]}"
    architecture, colon, weights = name.partition(":")
    if colon:
        path = Path(weights).expanduser()
        return f"{architecture}:{path.absolute()}" if path.is_file() else name
    path = Path(name).expanduser()
    return str(path.absolute()) if path.is_dir() else name


def load_teacher_of(run: Run, image_size: int) -> Backbone:
    """Load the only teacher that a run names, for images of this size.

    Raises:
        RunError: There are several.
    """
    name = run.only_teacher
    assert name is not None  # checked by the caller
    return load_teacher(
        os.path.expandvars(name),
        mean=run.teacher_mean,
        std=run.teacher_std,
        input_size=run.teacher_size,
        image_size=image_size,
        pooling=run.teacher_embedding,
    )


def load_teachers_of(run: Run, image_size: int) -> list[Backbone]:
    """Load all teachers that a run names, for images of this size."""
    return [load_teacher_of(replace(run, teacher=name), image_size) for name in run.teachers]


def refuse_twins(run: Run, teachers: Sequence[Backbone], images: Split) -> None:
    """Refuse a run that names one network twice, under two names.

    Networks without weights of their own, from Python files, are compared by what they return for a few images.

    Raises:
        RunError: Two teachers are the same network, or have caches that could not be told apart.
    """
    pixels = images.pixels[spread(len(images), PROBE_IMAGES)]
    for (name, one), (other_name, other) in combinations(zip(run.teachers, teachers, strict=True), 2):
        if one.embedding_dim != other.embedding_dim or fingerprint(one) != fingerprint(other):
            continue
        both = f"the teachers {name} and {other_name}"
        if embed(one, pixels).equal(embed(other, pixels)):
            raise RunError(f"{both} are the same network; leave one out")
        if run.views is not None:
            raise RunError(f"{both} have the same weights, so their caches cannot be told apart; leave out --views")


def examine(teacher: Backbone, images: Split, name: str | None = None) -> tuple[str, ...]:
    """Check the outputs of a teacher for a few of the images before all of them are embedded.

    Args:
        teacher: The teacher.
        images: The training images.
        name: Its name in the run. If it is the folder of a run, a constant embedding is only a warning, because
            the run may have been too short on purpose.

    Returns:
        Notes for the user: how the teacher was loaded, and warnings.

    Raises:
        ModelError: Its outputs are not usable.
    """
    rows = spread(len(images), PROBE_IMAGES)
    own = name is not None and Path(os.path.expandvars(name)).is_dir()
    sources = [images.sources[row] for row in rows.tolist()]
    return (*teacher.notes, *probe(teacher, images.pixels[rows], sources, constant_allowed=own))


def load_task_of(run: Run, grey_range: GreyRange | None = None) -> Task:
    """Load the images that a run names. Grey levels are scaled as in the training of a student, if it is given."""
    return load_task(
        run.task,
        data_root=Path(run.data_root) if run.data_root else None,
        shots=run.shots,
        shots_seed=run.seed,
        val=run.val,
        image_size=run.image_size,
        allow_bad=run.allow_bad,
        memory_limit=None if run.image_memory is None else int(run.image_memory * 2**30),
        grey_range=grey_range,
        unlabelled=run.unlabelled,
    )


def initial_student(text: str, pretrained: bool, task: Task) -> tuple[Backbone, list[str]]:
    """Build a student as it is before training, from torch's random numbers or from weights, with notes on the weights.

    Args:
        text: The student as a run names it.
        pretrained: Whether it starts from published weights, or those of a Python file are trained.
        task: The task.

    Raises:
        RunError: ``text`` names weights, and ``pretrained`` asks for others.
        ModelError: The student cannot be built.
    """
    notes: Sequence[str] = ()
    of_a_file = runs_code(text)
    if of_a_file or starts_from_weights(text):
        if pretrained and not of_a_file:
            raise RunError(f"--pretrained takes published weights, but '{text}' names others; leave one out")
        mean, std = channel_statistics(task.train.pixels)
        student, notes = create_student(text, task.classes, image_size=task.image_size, mean=mean, std=std)
    else:
        # Published weights expect the normalisation that they were trained with; fresh ones suit the data.
        normalization = (None, None) if pretrained else channel_statistics(task.train.pixels)
        student = create_model(
            text,
            len(task.classes),
            image_size=task.image_size,
            mean=normalization[0],
            std=normalization[1],
            pretrained=pretrained,
        )
        student.class_names = task.classes
    student.grey_range = task.grey_range
    return student, list(notes)


class Prepared:
    """A run whose images, networks and method are loaded and checked."""

    student: Backbone
    """The network that is scored: the one that the stages train, or the frozen teacher for a readout."""

    def __init__(self, run: Run, task: Task | None = None) -> None:
        use_machine(run.threads, run.device)
        method = load_method(run.method)
        if task is None:
            run = with_absolute_paths(run)
            task = load_task_of(run)
        self.task, self.run = task, run
        self.found: Tensor | None = None  # class ids of the scored images (N,), once a readout has classified them
        if run.score == "val" and len(self.task.val) == 0:
            raise RunError("score = 'val' needs images that are held out; give --val above 0")
        self.teachers = load_teachers_of(run, self.task.image_size)
        self.ignored: tuple[bool, ...] = (False,) * len(self.teachers)
        self.label_information: tuple[float | None, ...] = ()  # one per teacher if there are several, on a sample
        self.notes: tuple[str, ...] = ()
        torch.manual_seed(run.seed)
        student = None if run.student is None else self._begin(run.student)
        plan = method.build_for(student, dict(enumerate(self.teachers)), run.settings)
        self.stages: list[Stage] = []
        self.readout: Readout | None = None
        if isinstance(plan, Readout):
            assert self.teacher is not None  # checked by the method, as are the assertions below
            self.readout, self.student = plan, self.teacher
            self._balanced(())
        elif isinstance(plan, FineTuning):
            assert self.teacher is not None
            self.stages, self.student = self._balanced(plan.stages), self._copy(self.teacher)
        else:
            assert student is not None
            self.stages, self.student = self._balanced(plan), student
            if not any(stage.needs_teacher for stage in plan):
                self.teachers, self.ignored = [], ()
        for name, teacher in zip(run.teachers, self.teachers, strict=False):
            found = examine(teacher, self.task.train, name)
            self.notes += tuple(f"{name}: {note}" for note in found) if len(self.teachers) > 1 else found
        if len(self.teachers) > 1:
            refuse_twins(run, self.teachers, self.task.train)

    @property
    def teacher(self) -> Backbone | None:
        """The first teacher; None if the run has none."""
        return self.teachers[0] if self.teachers else None

    @property
    def ignores_teacher(self) -> bool:
        """Whether every teacher is ignored, so that the student is trained as ``vanilla`` does."""
        return len(self.ignored) > 0 and all(self.ignored)

    @property
    def scored(self) -> Split:
        """The images that are scored."""
        return self.task.test if self.run.score == "test" else self.task.val

    def ignore_teachers(self, ignored: Sequence[bool]) -> None:
        """Prepare the run again without some of the teachers, or as ``vanilla`` without any.

        Stages, initial weights and random numbers are those of a run without them.

        Args:
            ignored: Whether each teacher is ignored.
        """
        assert self.run.student is not None  # stages that need a teacher train a student
        notes = self.notes
        torch.manual_seed(self.run.seed)
        self.student = self._begin(self.run.student)
        self.notes, self.ignored = notes, tuple(ignored)  # they have those on the student's weights already
        if self.ignores_teacher:
            self.stages = self._balanced(vanilla(self.student, None))
            return
        kept = {number: teacher for number, teacher in enumerate(self.teachers) if not ignored[number]}
        plan = load_method(self.run.method).build_for(self.student, kept, self.run.settings)
        assert not isinstance(plan, Readout | FineTuning)  # nor was it with all teachers
        self.stages = self._balanced(plan)

    def _balanced(self, stages: Sequence[Stage]) -> list[Stage]:
        """Replace the cross-entropy of each stage by a balanced one if the run asks for it."""
        balance = self.run.balance
        if balance == "off":
            return list(stages)
        loss = BalancedCrossEntropyLoss(counts_of(self.task.train.labels, len(self.task.classes)), balance)
        plain = {
            (stage.name, name)
            for stage in stages
            for name, term in stage.terms.items()
            if type(term.loss) is nn.CrossEntropyLoss
        }
        if not plain:
            raise RunError(f"the method '{self.run.method}' has no cross-entropy to balance; leave out --balance")
        return [
            replace(
                stage,
                terms={
                    name: replace(term, loss=loss) if (stage.name, name) in plain else term
                    for name, term in stage.terms.items()
                },
            )
            for stage in stages
        ]

    def _begin(self, text: str) -> Backbone:
        student, notes = initial_student(text, self.run.pretrained, self.task)
        self.notes += tuple(notes)
        return student

    def _copy(self, teacher: Backbone) -> Backbone:
        student = trainable_copy(teacher, self.task.classes, torch.Generator().manual_seed(self.run.seed))
        student.image_size, student.grey_range = self.task.image_size, self.task.grey_range
        return student
