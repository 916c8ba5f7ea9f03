"""The complete configuration of a run, as frozen plain data.

Every field is a key of ``run.toml`` and a flag of the command line. Its line in the docstring is the flag's help.
This module has no heavy imports, so that ``refilled --help`` is quick.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

import tomli_w
from pydantic import TypeAdapter, ValidationError

from refilled.errors import RunError, unknown
from refilled.ranges import COUNT, MOST, PART, PIXELS, POSITIVE, SHARE, STD, THREADS, WHOLE, Range, check_fields
from refilled.recipe import Recipe

WHERE = ("data_root", "image_memory", "device", "threads", "cuda_graphs")
"""Fields that determine where and how a run is executed. They change its result only by rounding."""


YOUNGER: Mapping[str, Any] = {
    **{"optimizer": "sgd", "ema": 0.0, "head_steps": 0, "balance": "off", "guard": False},
    **{"auto_augment": "none", "color_jitter": 0.0, "random_erasing": 0.0},
}
"""Fields that are missing from older records, and their implicit values in those runs."""

_OF_TASKS = {"n_way": Range(2, MOST), "n_shot": COUNT, "n_query": COUNT, "n_episodes": COUNT, "seed": WHOLE}
_OF_MODELS = {"image_size": PIXELS, "threads": THREADS}
_OF_TEACHERS = {"teacher_size": PIXELS, "teacher_mean": SHARE, "teacher_std": STD}


def names_in(teacher: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names in a field that holds one name, several, or none."""
    return () if teacher is None else (teacher,) if isinstance(teacher, str) else tuple(teacher)


def what(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that determine the result."""
    return {name: value for name, value in values.items() if name not in WHERE}


@dataclass(frozen=True, kw_only=True)
class Run(Recipe):
    """The complete configuration of a run, as plain data.

    Attributes:
        task: Images and classes, for example ``cifar100:50-99`` or a folder of class folders.
        student: Architecture of the student, or weights to start from: a student folder, or ``architecture:weights``;
            or your own network, ``file.py:function``. Methods that train no student do not use it.
        teacher: A student folder, ``refilled/letters``, ``timm/<name>``, ``hf:<folder or name>``,
            ``architecture:weights``, or ``file.py:function``; environment variables are expanded, as in
            ``$REFILLED_DATA/teacher.py:load``. In a file, a list names several teachers.
        method: Name of a method, or path of a file that defines one.
        settings: The method's own parameters.
        guard: Ignore a teacher whose embedding tells the classes apart no better than chance, than the plain pixels or
            than the weights that the student starts from, and train as ``vanilla`` does.
        shots: Number of training images per class. None: all.
        unlabelled: Images without labels, for the loss terms that need none: ``rest`` for the training images that
            ``shots`` left out, a folder with images at any depth, or a task such as ``cifar100:0-49``,
            ``photos.parquet`` or ``wds:shards``, whose training images are used. Their labels are never read.
        val: Share of the training images of each class that is held out for validation and never trained on.
        score: Images that the result is computed on. With ``val``, the test images are not read, so the result can be
            used to choose between runs.
        image_size: Side length in pixels that images are resized to. None: chosen by the data.
        pretrained: Start a ``timm/`` student from published weights; say that the network of a Python file has trained
            weights, so that the defaults for students that start from weights apply.
        teacher_mean: Channel means of the teacher's input on the scale [0, 1], if the teacher does not define them.
        teacher_std: Channel standard deviations of the teacher's input, on the same scale.
        teacher_size: Side length in pixels of the teacher's input. None: the teacher's own, or that of the images.
            Vision transformers then take 224 or the size of the images, but no more than they were trained at.
        teacher_embedding: Output of the teacher that is its embedding: ``token`` (the class token), ``mean`` (of the
            patches), ``both``, or ``pooled`` (the input of its own classifier). None: chosen by its family.
        data_root: Folder of the data sets. None: ``$REFILLED_DATA``, or ``~/.cache/refilled/data``.
        allow_bad: Leave out unreadable images even if they are more than 1 % of all.
        image_memory: GiB of decoded images that a part of the task may hold in memory. A larger part is decoded to
            disk once for all runs, with equal results. None: a quarter of the free memory.
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        threads: Number of CPU threads. None: chosen by torch. Results are bit-identical at the same number.
        cuda_graphs: Use CUDA graphs on NVIDIA GPUs, for speed. Results are equal.
    """

    task: str
    student: str | None = None
    teacher: str | tuple[str, ...] | None = None
    method: str = "vanilla"
    settings: Mapping[str, Any] = field(default_factory=dict)
    guard: bool = False
    shots: int | None = None
    unlabelled: str | None = None
    val: float = 0.1
    score: Literal["test", "val"] = "test"
    image_size: int | None = None
    pretrained: bool = False
    teacher_mean: tuple[float, float, float] | None = None
    teacher_std: tuple[float, float, float] | None = None
    teacher_size: int | None = None
    teacher_embedding: Literal["pooled", "token", "mean", "both"] | None = None
    allow_bad: bool = False
    data_root: str | None = None
    image_memory: float | None = None
    device: str = "auto"
    threads: int | None = None
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, shots=COUNT, val=PART, image_memory=Range(0, 2**20), **_OF_MODELS, **_OF_TEACHERS)
        names = self.teachers
        if twice := [name for name in names if names.count(name) > 1]:
            raise RunError(f"the teacher {twice[0]} is named twice; name different teachers, or leave one out")
        object.__setattr__(self, "teacher", names[0] if len(names) == 1 else names or None)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The names of the teachers."""
        return names_in(self.teacher)

    @property
    def only_teacher(self) -> str | None:
        """The name of the teacher, where at most one makes sense.

        Raises:
            RunError: There are several.
        """
        if isinstance(self.teacher, tuple):
            names = ", ".join(self.teacher)
            raise RunError(f"this works with one teacher at a time, but there are {names}; name one with --teacher")
        return self.teacher

    def to_toml(self) -> str:
        """Return the configuration as TOML, without the fields that are None."""
        return _toml(asdict(self))

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Return the configuration that :meth:`to_toml` wrote.

        Raises:
            RunError: The text is not TOML, or a key is unknown, missing or of the wrong type.
        """
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise RunError(f"not a run's configuration: {error}") from error
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise RunError(unknown("key", name, known))
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise RunError(f"not a run's configuration: {'; '.join(problems)}") from error


@dataclass(frozen=True, kw_only=True)
class FewShotRun:
    """The configuration of a few-shot test: many tasks of unseen classes, and a method that learns each task.

    Attributes:
        data: Images with a class split, for example ``cifar_fs`` or ``photos@split=mine.json``.
        method: Few-shot method, or a distillation method, which trains a student per task.
        settings: The method's own parameters.
        teacher: The frozen model: a student folder, ``timm/<name>``, ``hf:<folder or name>``, ``architecture:weights``,
            or ``file.py:function``.
        n_way: Number of classes per task.
        n_shot: Number of support images per class.
        n_query: Maximum number of query images per class; fewer if the smallest class has fewer left.
        n_episodes: Number of tasks.
        side: Classes of the tasks: ``unseen``, or ``val`` to choose between methods or settings.
        seed: Seed of the tasks.
        batch: Number of tasks that the method processes at once.
        image_size: Side length in pixels that images are resized to. None: chosen by the data.
        teacher_mean: Channel means of the teacher's input on the scale [0, 1], if the teacher does not define them.
        teacher_std: Channel standard deviations of the teacher's input, on the same scale.
        teacher_size: Side length in pixels of the teacher's input. None: the teacher's own, or that of the images.
            Vision transformers then take 224 or the size of the images, but no more than they were trained at.
        teacher_embedding: Output of the teacher that is its embedding: ``token`` (the class token), ``mean`` (of the
            patches), ``both``, or ``pooled`` (the input of its own classifier). None: chosen by its family.
        allow_bad: Leave out unreadable images even if they are more than 1 % of all.
        data_root: Folder of the data sets. None: ``$REFILLED_DATA``, or ``~/.cache/refilled/data``.
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        threads: Number of CPU threads. None: chosen by torch.
    """

    data: str
    method: str = "nearest_neighbour"
    settings: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    n_way: int = 5
    n_shot: int = 1
    n_query: int = 15
    n_episodes: int = 600
    side: Literal["unseen", "val"] = "unseen"
    seed: int = 0
    batch: int = 20
    image_size: int | None = None
    teacher_mean: tuple[float, float, float] | None = None
    teacher_std: tuple[float, float, float] | None = None
    teacher_size: int | None = None
    teacher_embedding: Literal["pooled", "token", "mean", "both"] | None = None
    allow_bad: bool = False
    data_root: str | None = None
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, **_OF_TASKS, batch=COUNT, **_OF_MODELS, **_OF_TEACHERS)

    def to_toml(self) -> str:
        """Return the configuration as TOML, without the fields that are None."""
        return _toml(asdict(self))


@dataclass(frozen=True, kw_only=True)
class MetaRun:
    """The configuration of meta-training: many tasks of the seen classes teach how to learn from few images.

    Attributes:
        data: Images with a class split, for example ``cifar_fs`` or ``photos@split=mine.json``.
        method: Few-shot method to meta-train: ``protonet``, ``feat`` or ``maml``.
        settings: The method's own parameters.
        model: Architecture of the backbone.
        start: Folder of a model to start from, for example one of the seen classes; it determines the architecture.
        n_way: Number of classes per task.
        n_shot: Number of support images per class.
        n_query: Number of query images per class.
        n_episodes: Total number of tasks.
        tasks: Number of tasks per step.
        lr: Learning rate of Adam for the backbone, halved ten times; other parameters have ten times this rate.
        validate_every: Number of tasks between two validations; the best weights are kept.
        n_validation: Number of validation tasks.
        seed: Seed of the initial weights and the tasks.
        image_size: Side length in pixels that images are resized to. None: chosen by the data.
        allow_bad: Leave out unreadable images even if they are more than 1 % of all.
        data_root: Folder of the data sets. None: ``$REFILLED_DATA``, or ``~/.cache/refilled/data``.
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        threads: Number of CPU threads. None: chosen by torch.
    """

    data: str
    method: str = "protonet"
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str = "convnet4"
    start: str | None = None
    n_way: int = 5
    n_shot: int = 1
    n_query: int = 15
    n_episodes: int = 20000
    tasks: int = 1
    lr: float = 1e-3
    validate_every: int = 500
    n_validation: int = 100
    seed: int = 0
    image_size: int | None = None
    allow_bad: bool = False
    data_root: str | None = None
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_fields(
            self, **_OF_TASKS, tasks=COUNT, lr=POSITIVE, validate_every=COUNT, n_validation=COUNT, **_OF_MODELS
        )

    def to_toml(self) -> str:
        """Return the configuration as TOML, without the fields that are None."""
        return _toml(asdict(self))


def _toml(values: dict[str, Any]) -> str:
    given = {name: value for name, value in values.items() if value is not None}
    settings = {name: value for name, value in given.pop("settings").items() if value is not None}
    return tomli_w.dumps({**given, "settings": settings})
