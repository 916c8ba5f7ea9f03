"""The complete configuration of a run, as frozen plain data.

Every field is a key of ``run.toml`` and a flag of the command line. Its line in the docstring is the flag's help.
This module has no heavy imports, so that ``refilled --help`` is quick.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

import tomli_w
from pydantic import TypeAdapter, ValidationError

from refilled.errors import RunError, unknown
from refilled.ranges import AMOUNT, COUNT, MOST, PART, PIXELS, POSITIVE, SHARE, STD, THREADS, WHOLE, Range, check_fields

_Crops = Literal["auto", "none", "crop", "crop-flip", "resized-crop-flip"]
_Policy = Literal["none", "trivial", "rand"]
Precision = Literal["auto", "32-true", "bf16-mixed", "64-true"]

WHERE = ("data_root", "image_memory", "device", "threads", "cuda_graphs")
"""Fields that determine where and how a run is executed. They change its result only by rounding."""


YOUNGER: Mapping[str, Any] = {
    **{"optimizer": "sgd", "ema": 0.0, "balance": "off", "guard": False},
    **{"auto_augment": "none", "color_jitter": 0.0, "random_erasing": 0.0},
}
"""Fields that are missing from older records, and their implicit values in those runs."""

_SGD_ONLY_LR = 0.05
_OF_TASKS = {"n_way": Range(2, MOST), "n_shot": COUNT, "n_query": COUNT, "n_episodes": COUNT, "seed": WHOLE}
_OF_MODELS = {"image_size": PIXELS, "threads": THREADS}
_OF_TEACHERS = {
    "teacher_size": PIXELS,
    "teacher_mean": SHARE,
    "teacher_std": STD,
}


def names_in(teacher: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names in a field that holds one name, several, or none."""
    return () if teacher is None else (teacher,) if isinstance(teacher, str) else tuple(teacher)


def what(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that determine the result."""
    return {name: value for name, value in values.items() if name not in WHERE}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The optimisation of a student. The defaults suit short runs; ``PRESETS["paper"]`` is the recipe of the paper.

    Attributes:
        epochs: Passes over the training images, in all stages together, so that methods compare at equal cost. With
            unlabelled images, an epoch is a pass over the kind that takes more steps; the other kind is repeated.
        least_steps: Minimum number of steps; with few images, epochs are added. The command line uses 1000 if neither
            epochs nor a preset with epochs is given.
        batch_size: Maximum number of images per step; an epoch is split into batches of nearly equal size.
        lr: Peak learning rate.
        optimizer: ``sgd``, or ``adamw`` (Loshchilov and Hutter, ICLR 2019), which needs an ``lr`` of about 0.001.
        momentum: Momentum of SGD; the first beta of AdamW.
        nesterov: Whether SGD uses Nesterov momentum.
        weight_decay: Weight decay.
        ema: Decay of an exponential moving average of the student's weights, such as 0.99. The student of each stage
            is this average. The decay rises to this value over the first steps. 0: no average.
        schedule: ``cosine``: from ``lr`` to 0 over each stage; ``step``: times 0.2 after each quarter of a stage (the
            paper); ``late-step``: times 0.1 after 62.5, 75 and 87.5 % of it (Tian et al., ICLR 2020).
        warmup: Epochs of linear warm-up at the start of each stage.
        sampler: ``shuffle``: all images in random order; ``balanced``: K images of each of P classes in every batch.
        images_per_class: K of the balanced sampler.
        balance: Cross-entropy for classes of unequal size. ``logits`` adds the logarithm of each class's share of the
            training images to its logit in training (Menon et al., ICLR 2021); ``weights`` weighs each image by the
            inverse of that share. Both raise the balanced accuracy and may lower the accuracy.
        augmentation: ``auto`` chooses by the data; ``crop`` pads and crops; ``crop-flip`` also mirrors;
            ``resized-crop-flip`` enlarges a random part, for long runs with few images.
        auto_augment: ``trivial``: one random operation per image, such as a rotation by up to 135 degrees or a change
            of contrast (TrivialAugment, ICCV 2021); ``rand``: two moderate ones (RandAugment, NeurIPS 2020). The
            teacher sees the same image, as it does with the two options below.
        color_jitter: Change brightness, contrast and saturation by factors between 1 - J and 1 + J; J is 0 to 1, often
            0.4. The saturation of grey images is left as it is. 0: off.
        random_erasing: Probability that a rectangle of 2 to 33 % of an image is replaced by noise (Zhong et al., AAAI
            2020), for student and teacher alike. 0: off.
        views: Number of augmented views per image to cycle through; the teacher's embeddings of them are computed once
            and cached on disk. None: a new view in every epoch, with the teacher run live.
        mixup: Blend each image and its label with another image, with a share drawn from Beta(mixup, mixup). The
            teacher embeds the mixed images. 0: off (Zhang et al., ICLR 2018).
        cutmix: Replace a square patch with that of another image; its share of the area is drawn from
            Beta(cutmix, cutmix) (Yun et al., ICCV 2019). With ``mixup`` also, each applies to half of the views.
        unlabelled_share: Share of unlabelled images in a batch, if a run has some. With few labelled images the share
            is larger, because a batch never contains a labelled image twice.
        unlabelled_span: Share of each stage, from its start, that uses unlabelled images; the rest of the stage uses
            only labelled ones.
        precision: ``auto`` uses bfloat16 if the processor supports it in hardware, otherwise float32. On such CPUs a
            timm student is timed in both for two seconds, unless ``views`` is set, and the faster one is recorded.
        seed: Seed of the initial weights, the order, the augmentation and the choice of shots.
    """

    epochs: int = 60
    least_steps: int = 0
    batch_size: int = 64
    lr: float = 0.1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    ema: float = 0.0
    schedule: Literal["cosine", "step", "late-step"] = "cosine"
    warmup: float = 1.0
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    images_per_class: int = 4
    balance: Literal["off", "weights", "logits"] = "off"
    augmentation: _Crops = "auto"
    auto_augment: _Policy = "none"
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    views: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    unlabelled_share: float = 0.5
    unlabelled_span: float = 1.0
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            epochs=COUNT,
            least_steps=WHOLE,
            batch_size=COUNT,
            lr=POSITIVE,
            momentum=PART,
            ema=PART,
            weight_decay=AMOUNT,
            warmup=AMOUNT,
            color_jitter=SHARE,
            random_erasing=SHARE,
            views=COUNT,
            mixup=AMOUNT,
            cutmix=AMOUNT,
            unlabelled_share=Range(0, 1, above=True, below=True),
            unlabelled_span=SHARE,
            images_per_class=COUNT,
            seed=WHOLE,
        )
        for name, choices in (("augmentation", get_args(_Crops)), ("auto_augment", get_args(_Policy))):
            if getattr(self, name) not in choices:
                raise RunError(unknown(name, str(getattr(self, name)), choices))
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise RunError("nesterov needs a momentum above 0; raise --momentum, or add --no-nesterov")
        if self.optimizer == "adamw" and self.lr >= _SGD_ONLY_LR:
            raise RunError(f"lr = {self.lr} is a learning rate for SGD; AdamW needs about 0.001")

    def epochs_over(self, images: int, unlabelled: int = 0) -> int:
        """Return the number of epochs with this many labelled and unlabelled training images."""
        return max(self.epochs, math.ceil(self.least_steps / self.steps_over(images, unlabelled)))

    def steps_over(self, images: int, unlabelled: int = 0) -> int:
        """Return the number of steps per epoch, which is a pass over the kind of images that takes more steps."""
        known, others = self.batch_over(images, unlabelled)
        return max(math.ceil(images / known), math.ceil(unlabelled / others) if others else 0)

    def batch_over(self, images: int, unlabelled: int = 0) -> tuple[int, int]:
        """Return the maximum numbers of labelled and unlabelled images per step.

        Raises:
            RunError: A batch is too small for both kinds.
        """
        if not unlabelled:
            return min(self.batch_size, images), 0
        if self.batch_size < 2:
            raise RunError("labelled and unlabelled images share a batch; raise --batch-size to 2 or more")
        wanted = round(self.batch_size * (1 - self.unlabelled_share))
        known = min(max(1, wanted), images, self.batch_size - 1)
        return known, min(self.batch_size - known, unlabelled)


@dataclass(frozen=True, kw_only=True)
class Run(Recipe):
    """The complete configuration of a run, as plain data.

    Attributes:
        task: Images and classes, for example ``cifar100:50-99`` or a folder of class folders.
        student: Architecture of the student, or weights to start from: a student folder, ``architecture:weights``. None
            if the method trains no student.
        teacher: A student folder, ``refilled/letters``, ``timm/<name>``, ``hf:<folder or name>``,
            ``architecture:weights``, or ``file.py:function``; environment variables are expanded, as in
            ``$REFILLED_DATA/teacher.py:load``. In a file, a list names several teachers.
        method: Name of a method, or path of a file that defines one.
        settings: The method's own parameters.
        guard: Ignore a teacher whose embedding tells the classes apart no better than chance or than the plain pixels,
            and train as ``vanilla`` does.
        shots: Training images per class; None: all.
        unlabelled: Images without labels, for the loss terms that need none: ``rest`` for the training images that
            ``shots`` left out, a folder with images at any depth, or a task such as ``cifar100:0-49``,
            ``photos.parquet`` or ``wds:shards``, whose training images are used. Their labels are never read.
        val: Share of the training images of each class that is held out for validation; never trained on.
        score: Images that the result is computed on. With ``val`` the test images are not read, so the result can be
            used to choose between runs.
        image_size: Side length in pixels that images are resized to; None: chosen by the data.
        pretrained: Whether a ``timm/`` student starts from published weights.
        teacher_mean: Channel means that the teacher expects on the scale [0, 1], if they are not known.
        teacher_std: Channel standard deviations that the teacher expects, on the same scale.
        teacher_size: Side length in pixels of the teacher's input. None: the teacher's own, or that of the images.
            Vision transformers then take 224 or the size of the images, but no more than they were trained at.
        teacher_embedding: Output of the teacher that is its embedding: ``token`` (the class token), ``mean`` (of the
            patches), ``both``, or ``pooled`` (the input of its own classifier). None: chosen by its family.
        data_root: Folder that contains the data sets.
        allow_bad: Leave out unreadable images even if they are more than 1 % of all.
        image_memory: GiB of decoded images that a part of the task may hold in memory. A larger part is decoded to
            disk once for all runs, with equal results. None: a quarter of the free memory.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        threads: CPU threads; None: torch's choice. Results are bit-identical with equal threads.
        cuda_graphs: On an NVIDIA GPU, record the passes of networks once and replay them, for speed. Results are equal.
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
        method: A few-shot method, or any distillation method, which trains a student per task.
        settings: The method's own parameters.
        teacher: The frozen model: a student folder, ``timm/<name>``, ``hf:<folder or name>``, ``architecture:weights``,
            or ``file.py:function``.
        n_way: Classes per task.
        n_shot: Support images per class.
        n_query: Maximum number of query images per class; fewer if the smallest class has fewer left.
        n_episodes: Number of tasks.
        side: Classes of the tasks: ``unseen``, or ``val`` to choose between methods or settings.
        seed: Seed of the tasks.
        batch: Number of tasks that the method processes at once.
        image_size: Side length in pixels that images are resized to; None: chosen by the data.
        teacher_mean: Channel means that the teacher expects on the scale [0, 1], if they are not known.
        teacher_std: Channel standard deviations that the teacher expects, on the same scale.
        teacher_size: Side length in pixels of the teacher's input. None: the teacher's own, or that of the images.
            Vision transformers then take 224 or the size of the images, but no more than they were trained at.
        teacher_embedding: Output of the teacher that is its embedding: ``token`` (the class token), ``mean`` (of the
            patches), ``both``, or ``pooled`` (the input of its own classifier). None: chosen by its family.
        allow_bad: Leave out unreadable images even if they are more than 1 % of all.
        data_root: Folder that contains the data sets.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        threads: CPU threads; None: torch's choice.
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
        method: A few-shot method that is meta-trained: ``protonet``, ``feat``, ``maml``.
        settings: The method's own parameters.
        model: Architecture of the backbone.
        start: Folder of a model to start from, for example one of the seen classes; it determines the architecture.
        n_way: Classes per task.
        n_shot: Support images per class.
        n_query: Query images per class.
        n_episodes: Total number of tasks.
        tasks: Tasks per step.
        lr: Learning rate of Adam for the backbone; other parameters have ten times this rate. It is halved ten times.
        validate_every: Tasks between two validations; the best weights are kept.
        n_validation: Number of validation tasks.
        seed: Seed of the initial weights and the tasks.
        image_size: Side length in pixels that images are resized to; None: chosen by the data.
        allow_bad: Leave out unreadable images even if they are more than 1 % of all.
        data_root: Folder that contains the data sets.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        threads: CPU threads; None: torch's choice.
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
