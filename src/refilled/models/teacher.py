"""Teachers from wherever they are: a student folder, timm, a weight file, or a Python file of the user's."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from refilled.errors import ModelError
from refilled.models.architectures import create_model, is_architecture
from refilled.models.backbone import Backbone, freeze
from refilled.models.folder import DESCRIPTION, load_model
from refilled.models.timm_backbone import TimmBackbone, timm_model
from refilled.models.user_file import load_user_file
from refilled.models.weights import SUFFIXES, load_weights, read_state_dict

_FORMS = "a student folder, timm/<name>, <architecture>:WEIGHTS, or FILE.py:FUNCTION"


def load_teacher(
    text: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
) -> Backbone:
    """Load the teacher that ``text`` names, frozen.

    ======================================  =====================================================================
    ``runs/teacher``                        a folder that a run of ours, or :func:`save_model`, wrote
    ``timm/resnet50``                       a timm model with its published weights
    ``timm/resnet50:weights.safetensors``   a timm model with weights from a file
    ``wrn_40_2:teacher.pth``                an architecture of ours with weights from a file
    ``mine.py:make``, ``mine.py:make:arg``  what a function of the user's returns; see :func:`load_user_file`
    ======================================  =====================================================================

    Weight files are read as tensors only (safetensors, or ``torch.load(weights_only=True)``), and the number of
    classes is that of the weights. A user's Python file is run.

    Args:
        text: One of the forms above.
        mean: Mean of each channel that the teacher expects, on the scale [0, 1]; needed where nothing says it.
        std: Standard deviation likewise.
        input_size: Side length in pixels that the teacher sees; None for what it was trained at, where that is
            known, else the images as they come.

    Raises:
        ModelError: when there is no such teacher, or nothing says how its images are normalised.
    """
    user_file = re.fullmatch(r"(.+?\.py):(\w+)(?::(.*))?", text, re.DOTALL)
    if user_file:
        path, function, argument = user_file.groups()
        return freeze(load_user_file(Path(path), function, argument, mean=mean, std=std, input_size=input_size))
    teacher = _load(text, known_normalization=mean is not None and std is not None)
    teacher.set_preprocessing(mean, std, input_size)
    return freeze(teacher)


def _load(text: str, known_normalization: bool) -> Backbone:
    if (Path(text) / DESCRIPTION).is_file():
        return load_model(Path(text))
    architecture, colon, file = text.partition(":")
    if architecture.startswith("timm/"):
        name = architecture.removeprefix("timm/")
        teacher = _timm_with_weights(name, Path(file)) if colon else TimmBackbone(timm_model(name, pretrained=True))
        teacher.architecture = architecture
        return teacher
    if not colon:
        raise ModelError(f"'{text}' is no teacher: {_why_not(text)}")
    if not known_normalization:
        raise ModelError(f"{text} does not say how its images were normalised: give --teacher-mean and --teacher-std")
    return _with_weights(architecture, Path(file))


def _why_not(text: str) -> str:
    path = Path(text)
    if path.is_dir():
        return f"the folder holds no {DESCRIPTION}"
    if path.suffix == ".py":
        return f"say which function makes it, as in {text}:FUNCTION"
    if path.suffix in SUFFIXES:
        return f"a weight file does not say what it fits; write <architecture>:{text}, as in wrn_40_2:{text}"
    if is_architecture(text):
        return f"an architecture needs weights; write {text}:WEIGHTS"
    return f"there is no such file or folder; a teacher is {_FORMS}"


def _with_weights(architecture: str, path: Path) -> Backbone:
    if not is_architecture(architecture):
        create_model(architecture, 1)  # says what is wrong with the name
    weights = in_our_names(read_state_dict(path))
    if "classifier.weight" not in weights:
        raise ModelError(f"{path} holds no classifier.weight, so that it is no whole {architecture}")
    model = create_model(architecture, len(weights["classifier.weight"]))
    load_weights(model, weights, str(path))
    return model


def in_our_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under our names, where the field's published CIFAR models call the same thing otherwise."""
    return {_our_name(name): value for name, value in weights.items()}


def _our_name(name: str) -> str:
    name = re.sub(r"^(fc|linear)\.", "classifier.", name)
    return name.replace(".layer.", ".").replace(".convShortcut.", ".shortcut.")


def _timm_with_weights(name: str, path: Path) -> Backbone:
    body = timm_model(name)
    weights = read_state_dict(path)
    names = body.pretrained_cfg["classifier"]  # several, for models with several classifiers
    classifier = names if isinstance(names, str) else names[0]
    num_classes = len(weights.get(f"{classifier}.weight", ()))  # 0 for an extractor, which lacks but the logits
    if num_classes != body.num_classes:
        body.reset_classifier(num_classes)
    load_weights(body, weights, str(path))
    return TimmBackbone(body)
