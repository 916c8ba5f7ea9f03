"""The setup of the paper's experiments, and reduced versions of it: protocols, scales, recipes.

A protocol defines the images and the teacher of an experiment (supplement 2). A scale defines its size: ``paper`` is
the paper's; ``mini`` is the same protocol with fewer classes, images and epochs and with smaller networks; ``smoke``
only shows that everything runs. A recipe defines how all networks are optimised. A table has a single recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refilled.presets import PRESETS


@dataclass(frozen=True)
class Data:
    """The tasks of teacher and student at one scale."""

    teacher_task: str
    task: str
    epochs: int | None = None
    """Epochs of the teacher, and of the student over all its stages. None: those of the recipe."""
    image_size: int | None = None
    """Side length in pixels. None: that of the data."""
    views: int | None = None
    """Views per training image. The teacher embeds them once for all runs. None: new views in every run. With as many
    views as epochs, no student sees a view twice."""


@dataclass(frozen=True)
class Protocol:
    """An experiment of the paper: its teacher, its data at each scale, and ReFilled's settings."""

    summary: str
    teacher: str
    """Architecture, as in the paper."""
    data: Mapping[str, Data]
    temperature: float
    """Temperature tau of the teacher, in both stages of ReFilled."""
    kd_weight: float
    """``1000 * lambda``, the weight of local distillation in its first epoch."""


@dataclass(frozen=True)
class FewShotData:
    """Images and tasks of a few-shot experiment at one scale. The defaults are the paper's where it gives them."""

    pool: str
    """Images with a class split."""
    epochs: int | None = None
    """Epochs of the backbones on the seen classes. None: those of the recipe."""
    ways: int = 5
    tasks: int = 600
    costly_tasks: int = 600
    """Number of tasks for methods that are slow per task."""
    steps: int = 100
    """Training steps of a network per task."""
    tune_tasks: int = 100
    """Number of tasks of the validation classes on which settings and meta-trained models are evaluated."""
    trials: int = 30
    """Number of settings that a search tries."""
    costly_trials: int = 30
    """The same for methods that are slow per task. 0: no search; the row's settings are used."""
    meta_tasks: int = 20000
    meta_shots: int = 30
    """Maximum number of shots in meta-training. Tests may have more."""
    meta_lr: float = 1e-4

    @property
    def seen(self) -> str:
        """The task of the seen classes."""
        source, at, options = self.pool.partition("@")
        return f"{source}:seen{at}{options}"


@dataclass(frozen=True)
class FewShotProtocol:
    """A few-shot experiment of the paper: its data at each scale."""

    summary: str
    data: Mapping[str, FewShotData]


@dataclass(frozen=True)
class Scale:
    """The size of a reproduction."""

    summary: str
    networks: Mapping[str, str]
    """Replacements of the paper's architectures, by name. The others are kept."""

    def network(self, name: str) -> str:
        """Return the architecture that replaces one of the paper's at this scale."""
        return self.networks.get(name, name)


@dataclass(frozen=True)
class PaperRecipe:
    """How all networks of a table are optimised."""

    summary: str
    fields: Mapping[str, Any]
    """Fields of :class:`~refilled.recipe.Recipe`, for students and teachers."""
    teacher_epochs: int
    """Epochs of a teacher, instead of those in ``fields``."""


SCALES: Mapping[str, Scale] = {
    "smoke": Scale(
        "digits, the smallest networks, two epochs: shows that everything runs, and nothing else",
        {
            **dict.fromkeys(("wrn_40_2", "wrn_16_2", "wrn_40_1", "wrn_16_1"), "wrn_10_1"),
            **dict.fromkeys(("mobilenet_1", "mobilenet_0.75", "mobilenet_0.5", "mobilenet_0.25"), "mobilenet_0.125"),
            "resnet110": "resnet8",
            "timm/resnet34": "timm/resnet10t",
            "resnet12": "resnet12_0.0625",
        },
    ),
    "mini": Scale(
        "the same protocol with fewer classes, images, tasks and epochs, and with smaller networks",
        {
            "wrn_40_2": "wrn_16_2",
            "wrn_16_2": "wrn_10_2",
            "wrn_40_1": "wrn_16_1",
            "wrn_16_1": "wrn_10_1",
            "mobilenet_1": "mobilenet_0.5",
            "mobilenet_0.75": "mobilenet_0.375",
            "mobilenet_0.5": "mobilenet_0.25",
            "mobilenet_0.25": "mobilenet_0.125",
            "resnet110": "resnet20",
            "timm/resnet34": "timm/resnet10t",
            "resnet12": "resnet12_0.25",
        },
    ),
    "paper": Scale("the paper: all classes, images and epochs, its own networks", {}),
}

RECIPES: Mapping[str, PaperRecipe] = {
    "paper2020": PaperRecipe(
        "SGD 0.1, batches of 128, times 0.2 after each quarter of a stage, 200 epochs per stage (supplement 2.1)",
        PRESETS["paper"],
        teacher_epochs=200,
    ),
    "crd240": PaperRecipe(
        "SGD 0.05, batches of 64, times 0.1 at 62.5, 75 and 87.5 % of a stage, 240 epochs (Tian et al., ICLR 2020)",
        {
            "epochs": 240,
            "batch_size": 64,
            "lr": 0.05,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 5e-4,
            "schedule": "late-step",
            "warmup": 0.0,
        },
        teacher_epochs=240,
    ),
}

_SAME_DIGITS = Data("digits@shots=6,shots_seed=0", "digits@shots=6,shots_seed=0", epochs=2)
_OTHER_DIGITS = Data("digits:0-2@test=0.8", "digits:5-7@test=0.8", epochs=2)
# Teacher, student and all seeds share the same draw, as if the data set had this size.
_FEW_CIFAR = "cifar100:0-49@shots=100,shots_seed=0"
_CIFAR = {
    "smoke": _SAME_DIGITS,
    "mini": Data(_FEW_CIFAR, _FEW_CIFAR, epochs=24, views=24),
    "paper": Data("cifar100", "cifar100"),
}
_CUB = {
    "smoke": _SAME_DIGITS,
    "mini": Data("cub100_84", "cub100_84", epochs=50, views=50),
    "paper": Data("cub", "cub", image_size=224),
}

PROTOCOLS: Mapping[str, Protocol] = {
    "cross-task hard": Protocol(
        "CUB, teacher and student on the first and the last half of the classes in alphabetical order",
        "mobilenet_1",
        {
            "smoke": _OTHER_DIGITS,
            "mini": Data("cub100_84:0-49@test=0.3", "cub100_84:50-99@test=0.3", epochs=60, views=60),
            "paper": Data("cub:0-99@test=0.3", "cub:100-199@test=0.3", image_size=224),
        },
        temperature=2.0,
        kd_weight=10.0,
    ),
    "cross-task easy": Protocol(
        "CUB, teacher and student on a random half of the classes and the other",
        "mobilenet_1",
        {
            "smoke": _OTHER_DIGITS,
            "mini": Data("cub100_84:random-half@test=0.3", "cub100_84:other-half@test=0.3", epochs=60, views=60),
            "paper": Data("cub:random-half@test=0.3", "cub:other-half@test=0.3", image_size=224),
        },
        temperature=2.0,
        kd_weight=10.0,
    ),
    "cifar100": Protocol("CIFAR-100, standard split", "wrn_40_2", _CIFAR, temperature=4.0, kd_weight=20.0),
    "cifar100, another family": Protocol(
        "CIFAR-100, standard split", "resnet110", _CIFAR, temperature=4.0, kd_weight=20.0
    ),
    "cub": Protocol("CUB, standard split", "mobilenet_1", _CUB, temperature=4.0, kd_weight=10.0),
    "cub, another family": Protocol("CUB, standard split", "timm/resnet34", _CUB, temperature=4.0, kd_weight=10.0),
}

_FEW_DIGITS = FewShotData(
    "digits",
    epochs=2,
    ways=3,
    tasks=4,
    costly_tasks=2,
    steps=4,
    tune_tasks=2,
    trials=2,
    costly_trials=0,
    meta_tasks=2,
    meta_shots=5,
)
_MINI_IMAGENET = FewShotData("mini_imagenet")
_MINI: Mapping[str, Any] = {
    "epochs": 12,
    "costly_tasks": 30,
    "steps": 30,
    "trials": 10,
    "costly_trials": 0,
    "tune_tasks": 60,
    "meta_tasks": 400,
    "meta_shots": 5,
    "meta_lr": 5e-4,  # for a fiftieth of the tasks
}

FEW_SHOT: Mapping[str, FewShotProtocol] = {
    "few-shot": FewShotProtocol(
        "MiniImageNet, 64 seen, 16 validation and 20 unseen classes, 15 queries per class; at scale mini CIFAR-FS",
        {"smoke": _FEW_DIGITS, "mini": FewShotData("cifar_fs", **_MINI), "paper": _MINI_IMAGENET},
    ),
    "few-shot, Tiny-ImageNet": FewShotProtocol(
        "MiniImageNet, 64 seen, 16 validation and 20 unseen classes, 15 queries per class; at scale mini Tiny-ImageNet",
        {
            "smoke": _FEW_DIGITS,
            "mini": FewShotData("tinyimagenet64@split=tiny_imagenet", **_MINI),
            "paper": _MINI_IMAGENET,
        },
    ),
}
