"""The configuration of a run: frozen plain data, and all there is.

Every field is a key of ``run.toml`` and a flag of the command line, and its line in the docstring is the flag's help.
This module loads nothing heavy, so that ``refilled --help`` answers at once.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

import tomli_w
from pydantic import TypeAdapter, ValidationError

from refilled.errors import RunError, unknown

Precision = Literal["auto", "32-true", "bf16-mixed", "64-true"]

WHERE = ("data_root", "image_memory", "device", "threads", "cuda_graphs")
"""Fields that say where and how a run is carried out, and not what it is: they change its result by rounding alone."""


YOUNGER: Mapping[str, Any] = {"optimizer": "sgd", "ema": 0.0, "guard": False}
"""Fields that older records lack, with the value that those runs had without naming it."""

_SGD_ONLY_LR = 0.05


def what(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a configuration's fields that say what is carried out."""
    return {name: value for name, value in values.items() if name not in WHERE}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student is optimised. The defaults suit short runs; ``PRESETS["paper"]`` is what the paper did.

    Attributes:
        epochs: Passes over the training images, all stages together: methods compare at equal cost. With unlabelled
            images, passes over those or over the labelled ones, whichever takes more steps; the others are repeated.
        least_steps: Take more epochs where images are few, so that there are at least so many steps. The command line
            takes 1000 where neither epochs nor a preset that has them is given.
        batch_size: Images a step, at most; an epoch is cut into batches of nearly equal size.
        lr: Learning rate at its highest.
        optimizer: ``sgd``, or ``adamw`` (Loshchilov and Hutter, ICLR 2019), which needs an ``lr`` of about 0.001.
        momentum: Momentum of SGD; the first beta of AdamW.
        nesterov: Whether SGD's momentum is Nesterov's.
        weight_decay: Weight decay.
        ema: Decay of an exponential moving average of the student's weights, such as 0.99; the student of each stage
            is that average. It rises to this value over the first steps. 0 for no average.
        schedule: ``cosine``: from ``lr`` to 0 over each stage; ``step``: times 0.2 after each quarter of a stage (the
            paper); ``late-step``: times 0.1 after 62.5, 75 and 87.5 % of it (Tian et al., ICLR 2020).
        warmup: Epochs of linear warm-up at the beginning of each stage.
        sampler: ``shuffle``: all images in random order; ``balanced``: P classes with K images each in every batch.
        images_per_class: K of the balanced sampler.
        augmentation: ``auto`` takes what suits the data: ``crop`` pads and crops, ``crop-flip`` also mirrors;
            ``resized-crop-flip`` enlarges a random part, for long runs with few images.
        views: Replay so many augmented views of each image in turn, and keep the teacher's embeddings of them on disk,
            computed once; None for a new view in every epoch, which the teacher sees live.
        mixup: Blend each image with another one, by a share drawn from Beta(mixup, mixup), and its labels likewise; the
            teacher sees the mixture. 0 for not at all (Zhang et al., ICLR 2018).
        cutmix: Put a square patch of another image in its place instead, the share of the area being drawn likewise
            (Yun et al., ICCV 2019). With ``mixup`` too, each is done in half of the views.
        unlabelled_share: Share of a batch that unlabelled images take, where a run has some. With few labelled images
            it is more: a batch never holds a labelled image twice.
        unlabelled_span: Share of each stage during which unlabelled images are seen; the rest of the stage sees only
            labelled ones.
        precision: ``auto`` takes bfloat16 where the processor computes with it, else float32.
        seed: Of the initial weights, the order, the augmentation and the choice of shots.
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
    augmentation: Literal["auto", "none", "crop", "crop-flip", "resized-crop-flip"] = "auto"
    views: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    unlabelled_share: float = 0.5
    unlabelled_span: float = 1.0
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "epochs": self.epochs >= 1,
            "least_steps": self.least_steps >= 0,
            "batch_size": self.batch_size >= 1,
            "lr": math.isfinite(self.lr) and self.lr > 0,
            "momentum": 0 <= self.momentum < 1,
            "ema": 0 <= self.ema < 1,
            "weight_decay": math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "warmup": math.isfinite(self.warmup) and self.warmup >= 0,
            "views": self.views is None or self.views >= 1,
            "mixup": math.isfinite(self.mixup) and self.mixup >= 0,
            "cutmix": math.isfinite(self.cutmix) and self.cutmix >= 0,
            "unlabelled_share": 0 < self.unlabelled_share < 1,
            "unlabelled_span": 0 <= self.unlabelled_span <= 1,
            "images_per_class": self.images_per_class >= 1,
            "seed": 0 <= self.seed < 2**31,
        }
        for name, holds in rules.items():
            if not holds:
                raise RunError(f"{name} = {getattr(self, name)} is out of range")
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise RunError("nesterov needs a momentum above 0")
        if self.optimizer == "adamw" and self.lr >= _SGD_ONLY_LR:
            raise RunError(f"lr = {self.lr} is a rate for SGD; AdamW needs about 0.001")

    def epochs_over(self, images: int, unlabelled: int = 0) -> int:
        """Return how many epochs there are with so many labelled and unlabelled training images."""
        return max(self.epochs, math.ceil(self.least_steps / self.steps_over(images, unlabelled)))

    def steps_over(self, images: int, unlabelled: int = 0) -> int:
        """Return the number of steps in an epoch: a pass over the kind of images that takes more of them."""
        known, others = self.batch_over(images, unlabelled)
        return max(math.ceil(images / known), math.ceil(unlabelled / others) if others else 0)

    def batch_over(self, images: int, unlabelled: int = 0) -> tuple[int, int]:
        """Return how many labelled and how many unlabelled images a step takes, at most.

        Raises:
            RunError: a batch has no room for both kinds.
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
    """The configuration of a run: plain data, and all there is.

    Attributes:
        task: Which images of which classes, for example ``cifar100:50-99`` or a folder of class folders.
        student: Architecture of the student, or weights to start from: a student folder, ``architecture:weights``. None
            where the method trains no student of its own.
        teacher: A student folder, ``refilled/letters``, ``timm/<name>``, ``hf:<folder or name>``,
            ``architecture:weights``, or ``file.py:function``; variables of the environment, as in
            ``$REFILLED_DATA/teacher.py:load``, are filled in.
        method: Name of a method, or the path of a file that defines one.
        settings: The method's own parameters.
        guard: Ignore a teacher whose embedding tells the classes apart no better than chance or than the plain pixels,
            and train as ``vanilla`` does.
        shots: Training images a class; None for all.
        unlabelled: Images whose labels are unknown or not to be used, for the terms of a method that need none:
            ``rest`` for the training images that ``shots`` left out, a folder with images at any depth, or a task such
            as ``cifar100:0-49``, ``photos.parquet`` or ``wds:shards``, whose training images are taken.
        val: Part of the training images that is held out by class to watch the progress; never trained on.
        score: Which images the result is about; with ``val`` the test images are not looked at, so that one may choose
            between runs by it.
        image_size: Side length that images are brought to; None for what suits them.
        pretrained: Whether a ``timm/`` student starts from published weights.
        teacher_mean: Channel means that the teacher expects on the scale [0, 1], where they are not known.
        teacher_std: Standard deviations likewise.
        teacher_size: Side length in pixels that the teacher sees; None for its own, or the images as they come. Vision
            transformers then see 224, or the size of the images, but not more than they were trained at.
        teacher_embedding: Which output of the teacher is its embedding: ``token`` (the class token), ``mean`` (of the
            patches), ``both``, or ``pooled`` (what its own classifier reads); None for what suits its family.
        data_root: Folder that holds the data sets.
        allow_bad: Leave out images that cannot be read even if they are more than 1 % of all.
        image_memory: GiB of decoded images that a part of the task may hold in memory; a larger part lies on disk,
            decoded once for all runs, and nothing else changes. None for a quarter of the memory that is free.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        threads: Processor threads; None for as many as torch chooses. Results are bit-identical at equal threads.
        cuda_graphs: On an NVIDIA GPU, record the passes of networks once and replay them: the same, but faster.
    """

    task: str
    student: str | None = None
    teacher: str | None = None
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

    def to_toml(self) -> str:
        """Write the configuration down; what is None is left out."""
        return _toml(asdict(self))

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Read what :meth:`to_toml` wrote.

        Raises:
            RunError: the text is no TOML, or a key is unknown, missing or of the wrong type.
        """
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
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
    """The configuration of a few-shot test: many tasks of unseen classes, and a method that learns each anew.

    Attributes:
        data: Images with a class split, for example ``cifar_fs`` or ``photos@split=mine.json``.
        method: A few-shot method, or any distillation method, which then trains a student for each task.
        settings: The method's own parameters.
        teacher: The frozen model: a student folder, ``timm/<name>``, ``hf:<folder or name>``, ``architecture:weights``,
            or ``file.py:function``.
        n_way: Classes of a task.
        n_shot: Support images a class.
        n_query: Query images a class, at most: fewer where the smallest class has fewer left.
        n_episodes: Tasks.
        side: Classes that the tasks are of: ``unseen``; ``val`` while anything is still being decided.
        seed: Of the tasks.
        batch: Tasks handed to the method at a time.
        image_size: Side length that images are brought to; None for what suits them.
        teacher_mean: Channel means that the teacher expects on the scale [0, 1], where they are not known.
        teacher_std: Standard deviations likewise.
        teacher_size: Side length in pixels that the teacher sees; None for its own, or the images as they come. Vision
            transformers then see 224, or the size of the images, but not more than they were trained at.
        teacher_embedding: Which output of the teacher is its embedding: ``token`` (the class token), ``mean`` (of the
            patches), ``both``, or ``pooled`` (what its own classifier reads); None for what suits its family.
        allow_bad: Leave out images that cannot be read even if they are more than 1 % of all.
        data_root: Folder that holds the data sets.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        threads: Processor threads; None for as many as torch chooses.
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
        _at_least(self, n_way=2, n_shot=1, n_query=1, n_episodes=1, seed=0, batch=1)

    def to_toml(self) -> str:
        """Write the configuration down; what is None is left out."""
        return _toml(asdict(self))


@dataclass(frozen=True, kw_only=True)
class MetaRun:
    """The configuration of meta-training: many tasks of the seen classes teach how to learn from few images.

    Attributes:
        data: Images with a class split, for example ``cifar_fs`` or ``photos@split=mine.json``.
        method: A few-shot method that is meta-trained: ``protonet``, ``feat``, ``maml``.
        settings: Its own parameters.
        model: Architecture of the backbone.
        start: A folder with a model to start from, say of the seen classes; its architecture counts.
        n_way: Classes of a task.
        n_shot: Support images a class.
        n_query: Query images a class.
        n_episodes: Tasks in all.
        tasks: Tasks a step.
        lr: Learning rate of Adam for the backbone; what else is learned has ten times as much. It halves ten times.
        validate_every: Tasks between two looks at the validation classes; the best weights are kept.
        n_validation: Validation tasks.
        seed: Of the initial weights and of the tasks.
        image_size: Side length that images are brought to; None for what suits them.
        allow_bad: Leave out images that cannot be read even if they are more than 1 % of all.
        data_root: Folder that holds the data sets.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        threads: Processor threads; None for as many as torch chooses.
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
        _at_least(self, n_way=2, n_shot=1, n_query=1, n_episodes=1, tasks=1, validate_every=1, n_validation=1, seed=0)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise RunError(f"lr = {self.lr} is out of range")

    def to_toml(self) -> str:
        """Write the configuration down; what is None is left out."""
        return _toml(asdict(self))


def _at_least(config: object, **least: int) -> None:
    for name, value in least.items():
        if getattr(config, name) < value:
            raise RunError(f"{name} = {getattr(config, name)} is out of range; give {value} or more")


def _toml(values: dict[str, Any]) -> str:
    given = {name: value for name, value in values.items() if value is not None}
    settings = {name: value for name, value in given.pop("settings").items() if value is not None}
    return tomli_w.dumps({**given, "settings": settings})
