"""Architectures by name, and plain-data descriptions from which saved models are rebuilt."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from torch import Tensor, nn

from refilled.errors import ModelError, unknown
from refilled.models.backbone import Backbone, Pooling
from refilled.models.cifar_resnet import DEPTHS, CifarResNet
from refilled.models.convnet import ConvNet4
from refilled.models.mobilenet import MobileNet
from refilled.models.resnet12 import ResNet12
from refilled.models.timm_backbone import TimmBackbone, timm_model
from refilled.models.user_file import Function
from refilled.models.user_student import rebuilt
from refilled.models.wide_resnet import WideResNet
from refilled.words import count_of


class Family(NamedTuple):
    """A family of architectures: the form of its names, and a function that builds one."""

    form: str
    summary: str
    pattern: str
    examples: tuple[str, ...]
    build: Callable[[re.Match[str], int, int, bool], Backbone]
    """From the matched name, the number of classes, the image size, and whether pretrained."""


FAMILIES = (
    Family(
        "wrn_<depth>_<width>",
        "Wide ResNet for small images (about 32 pixels), depth 6n + 4",
        r"wrn_(\d{1,3})_(\d{1,2})",
        ("wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"),
        lambda name, classes, size, pretrained: WideResNet(int(name[1]), int(name[2]), classes),
    ),
    Family(
        "convnet4, convnet4_average",
        "ConvNet-4 of few-shot learning, 64-d: global maximum or average, 16 pixels and more",
        r"convnet4(_average)?",
        ("convnet4", "convnet4_average"),
        lambda name, classes, size, pretrained: ConvNet4(classes, "average" if name[1] else "max", size),
    ),
    Family(
        "resnet12, resnet12_<width>",
        "ResNet-12 of few-shot learning, 640-d, 16 pixels and more, width such as 0.5, 0.25",
        r"resnet12(?:_(\d{1,2}(?:\.\d{1,6})?))?",  # before the CIFAR ResNets, which have no depth 12
        ("resnet12", "resnet12_0.5"),
        lambda name, classes, size, pretrained: ResNet12(classes, size, float(name[1] or 1)),
    ),
    Family(
        "resnet<depth>",
        f"ResNet for small images (about 32 pixels), depth one of {', '.join(map(str, DEPTHS))}",
        r"resnet(\d{1,3})",
        tuple(f"resnet{depth}" for depth in DEPTHS),
        lambda name, classes, size, pretrained: CifarResNet(int(name[1]), classes),
    ),
    Family(
        "mobilenet_<width>",
        "MobileNet (version 1) for images of any size, width such as 1, 0.75, 0.5, 0.25",
        r"mobilenet_(\d{1,2}(?:\.\d{1,6})?)",
        ("mobilenet_0.25", "mobilenet_0.5", "mobilenet_0.75", "mobilenet_1"),
        lambda name, classes, size, pretrained: MobileNet(float(name[1]), classes, size),
    ),
    Family(
        "timm/<name>",
        "any model of the timm library, such as timm/resnet18; timm.list_models() names them",
        r"timm/([\w.-]+)",
        ("timm/resnet18", "timm/mobilenetv3_small_050"),
        lambda name, classes, size, pretrained: TimmBackbone(timm_model(name[1], pretrained), classes),
    ),
)


def list_models() -> list[tuple[str, str]]:
    """Return the form of each family's names and a one-line summary."""
    return [(family.form, family.summary) for family in FAMILIES]


def is_architecture(name: str) -> bool:
    """Return whether ``name`` has the form of any family's names."""
    return any(re.fullmatch(family.pattern, name) for family in FAMILIES)


def create_model(
    name: str,
    num_classes: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    image_size: int = 224,
    pretrained: bool = False,
) -> Backbone:
    """Build the architecture of this name, with a fresh classifier.

    Args:
        name: Name such as ``wrn_16_2``, ``mobilenet_0.5`` or ``timm/resnet18``; see :func:`list_models`.
        num_classes: Number of classes.
        mean: Mean of each channel of the images on the scale [0, 1]; None: the model's own, or 0.5.
        std: Standard deviation of each channel, on the same scale.
        input_size: Side length in pixels that images are resized to. None: no resizing, or the only size that the model
            takes.
        image_size: Native side length of the images; families that adapt to it (``mobilenet``) do so.
        pretrained: Whether to start from the published weights (``timm/`` only).

    Raises:
        ModelError: The name is unknown, the number of classes is below 1, or there are no published weights.
    """
    if num_classes < 1:
        raise ModelError(f"{name}: the number of classes must be 1 or more; got {num_classes}")
    if pretrained and not name.startswith("timm/"):
        raise ModelError(f"'{name}' has no published weights; use a timm/ model, or train it")
    for family in FAMILIES:
        if match := re.fullmatch(family.pattern, name):
            model = family.build(match, num_classes, image_size, pretrained)
            model.set_preprocessing(mean, std, input_size)
            model.architecture, model.image_size = name, image_size
            return model
    raise ModelError(unknown("model", name, [example for family in FAMILIES for example in family.examples]))


def describe(model: Backbone) -> dict[str, Any]:
    """Return the plain data from which :func:`from_description` rebuilds the model, without its weights.

    Raises:
        ModelError: The model was not built by :func:`create_model`.
    """
    if model.architecture is None:
        raise ModelError("only models built by name can be described; this one comes from a user's file")
    return {
        "architecture": model.architecture,
        "num_classes": model.num_classes,
        "image_size": model.image_size,
        "input_size": model.input_size,
        "grey_range": None if model.grey_range is None else list(model.grey_range),
        "mean": _numbers(model.mean),
        "std": _numbers(model.std),
        "classes": None if model.class_names is None else list(model.class_names),
        **({} if model.pooling == "pooled" else {"pooling": model.pooling}),
        **({} if model.code is None else {"code": model.code}),
    }


def from_description(description: Mapping[str, Any]) -> Backbone:
    """Rebuild a model, with fresh weights, from a description by :func:`describe`.

    The architecture is looked up in the known families. That of a student from a user's Python file is executed only if
    the user has named the file; see :mod:`refilled.models.user_student`.

    Raises:
        ModelError: The description is incomplete or has unusable values.
    """
    for key, kind in _KEYS.items():
        if key not in description:
            raise ModelError(f"the description of the model lacks '{key}'")
        value = description[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ModelError(f"the description of the model has an unusable '{key}': {value!r:.80}")
    if not all(isinstance(number, int | float) for number in (*description["mean"], *description["std"])):
        raise ModelError("the description of the model has a mean or std that is not a list of numbers")
    num_classes = description["num_classes"]
    form: dict[str, Any] = {
        "mean": description["mean"],
        "std": description["std"],
        "input_size": description["input_size"],
        "image_size": description["image_size"],
    }
    if (function := Function.named(description["architecture"])) is not None:
        model = rebuilt(function, description.get("code"), num_classes, **form)
    else:
        model = create_model(description["architecture"], num_classes, **form)
    pooling = description.get("pooling", "pooled")
    if pooling != "pooled":
        if pooling not in get_args(Pooling):
            raise ModelError(f"the description of the model has an unusable 'pooling': {pooling!r:.80}")
        model.set_pooling(pooling)
        model.classifier, model.num_classes = nn.Linear(model.embedding_dim, num_classes), num_classes
    classes = description["classes"]
    if classes is not None and len(classes) != model.num_classes:
        named = count_of(len(classes), "class")
        raise ModelError(f"the description of the model names {named} but counts {model.num_classes}")
    model.grey_range = _grey_range(description.get("grey_range", _GREY_RANGE_BEFORE))
    model.class_names = None if classes is None else tuple(map(str, classes))
    return model


_GREY_RANGE_BEFORE = [0, 65535]
"""The range of 16-bit images before descriptions contained it."""


def _grey_range(said: Any) -> tuple[float, float] | None:
    if said is None:
        return None
    numbers = said if isinstance(said, list) else []
    if len(numbers) != 2 or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        raise ModelError(f"the description of the model has an unusable 'grey_range': {said!r:.80}")
    if not numbers[0] < numbers[1]:
        raise ModelError(
            f"the description of the model has a 'grey_range' whose white is not above black: {said!r:.80}"
        )
    return numbers[0], numbers[1]


_KEYS: dict[str, Any] = {
    "architecture": str,
    "num_classes": int,
    "image_size": int,
    "input_size": int | None,
    "mean": list,
    "std": list,
    "classes": list | None,
}


def _numbers(values: Tensor) -> list[float]:
    """Return the shortest decimals that read back as the same float32 numbers."""
    return [float(str(value)) for value in values.float().flatten().cpu().numpy()]
