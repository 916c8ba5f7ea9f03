"""Students that start from the weights of a run or a file, or from published weights."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from refilled.errors import ModelError
from refilled.models.architectures import create_model, is_architecture
from refilled.models.backbone import Backbone
from refilled.models.folder import DESCRIPTION, classes_of, load_model
from refilled.models.timm_backbone import TimmBackbone, timm_classifiers, timm_model
from refilled.models.user_file import Function
from refilled.models.user_student import user_student
from refilled.models.weights import (
    in_our_names,
    in_timm_names,
    path_and_branch,
    read_weights,
    renamed_by_order,
    without,
)
from refilled.words import count_of

_SHOWN = 4  # names in a message, so that it stays readable
_LEAST_FOUND = 0.5  # below this share of the tensors, a file belongs to another network


class Start(NamedTuple):
    """The weights that a student starts from."""

    architecture: str
    weights: dict[str, Tensor]
    """By the names in the student, without its classifier."""
    mean: list[float] | None
    """The normalisation in the training of the weights, if known."""
    std: list[float] | None
    source: str


def starts_from_weights(text: str | None, pretrained: bool = False) -> bool:
    """Return whether a student starts from weights: ``text`` names some, or ``pretrained`` says so.

    The network of a Python file may have any weights, so only ``pretrained`` says that they are trained.
    """
    if pretrained or text is None:
        return pretrained
    text = os.path.expandvars(text)
    if is_architecture(text) or Function.named(text) is not None:
        return False
    return _is_model_folder(text) or ":" in text


def classes_of_folder(text: str | None) -> Sequence[str]:
    """Return the names of the classes of a student whose folder ``text`` names; none if it names something else."""
    if text is None or not _is_model_folder(folder := os.path.expandvars(text)):
        return ()
    return classes_of(Path(folder))


def create_student(
    text: str,
    class_names: Sequence[str],
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Backbone, list[str]]:
    """Build the student that ``text`` names, starting from its weights, with a fresh classifier.

    =======================================  ====================================================
    ``runs/student``                         a folder that a run, or :func:`save_model`, wrote
    ``timm/resnet18:weights.safetensors``    a timm model with weights from a file
    ``wrn_16_2:student.pth``                 one of our architectures with weights from a file
    ``mine.py:make``, ``mine.py:make:arg``   the network that a user's function returns, with its weights
    =======================================  ====================================================

    The images are normalised as the weights expect. Where nothing records that, ``mean`` and ``std`` are used.

    Args:
        text: One of the forms above; environment variables are expanded.
        class_names: Names of the classes of the fresh classifier.
        image_size: Side length of the task's images in pixels.
        mean: Mean of each channel of the task's images, on the scale [0, 1].
        std: Standard deviation of each channel of the task's images.

    Returns:
        The student, and notes for the user about tensors that the file lacks and tensors of the file that are not used.

    Raises:
        ModelError: The weights do not exist, or they belong to another network.
    """
    text = os.path.expandvars(text)
    if (function := Function.named(text)) is not None:
        student, notes = user_student(function, len(class_names), mean=mean, std=std, image_size=image_size)
        student.class_names = tuple(class_names)
        return student, notes
    notes = []
    start = _find(text, notes)
    student = create_model(start.architecture, len(class_names), image_size=image_size, mean=start.mean, std=start.std)
    student.class_names = tuple(class_names)
    notes += _load_body(student, start)
    if start.mean is None and not start.architecture.startswith("timm/"):  # timm records it
        student.set_preprocessing(mean, std)
        notes.append(f"{start.source} does not record how its images were normalised; the task's mean and std are used")
    return student, notes


def _find(text: str, notes: list[str]) -> Start:
    if _is_model_folder(text):
        return _from_folder(Path(text))
    architecture, _, file = text.partition(":")
    if not is_architecture(architecture):
        create_model(architecture, 1)  # raises an error about the name
    path, branch = path_and_branch(file)
    if not architecture.startswith("timm/"):
        weights = _body(in_our_names(read_weights(path, branch, notes.append)))
        return Start(architecture, weights, None, None, file)
    body = timm_model(architecture.removeprefix("timm/"))
    weights = in_timm_names(read_weights(path, branch, notes.append, body.state_dict().keys()), body)
    return Start(architecture, {f"body.{name}": value for name, value in weights.items()}, None, None, file)


def _from_folder(folder: Path) -> Start:
    model = load_model(folder)
    assert model.architecture is not None  # every model in a folder has one
    mean, std = model.mean.flatten().tolist(), model.std.flatten().tolist()
    return Start(model.architecture, _body(model.state_dict()), mean, std, str(folder))


def _is_model_folder(text: str) -> bool:
    return (Path(text) / DESCRIPTION).is_file()


def _body(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith("classifier.")}


def _load_body(student: Backbone, start: Start) -> list[str]:
    """Load the weights into the student except its classifier, and return notes for the user."""
    own = _body(student.state_dict())
    classifiers = timm_classifiers(student.body) if isinstance(student, TimmBackbone) else []
    given = without([f"body.{name}" for name in classifiers], start.weights)
    notes: list[str] = []
    given = renamed_by_order(given, own, start.source, notes.append)
    found = {name: value for name, value in given.items() if name in own and value.shape == own[name].shape}
    missing = [name for name in own if name not in found and not name.endswith("num_batches_tracked")]
    if len(found) < _LEAST_FOUND * len(own):
        raise ModelError(
            f"{start.source} does not fit {start.architecture}: it contains {len(found)} of its {len(own)} tensors; "
            f"missing {_first(missing)}"
        )
    student.load_state_dict(found, strict=False)
    unused = [name for name in given if name not in found]
    if missing:
        notes.append(
            f"not found in {start.source}, and initialised at random: {count_of(len(missing), 'tensor')}, "
            f"{_first(missing)}"
        )
    if unused:
        notes.append(f"not used from {start.source}: {count_of(len(unused), 'tensor')}, {_first(unused)}")
    return notes


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
