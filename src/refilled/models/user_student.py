"""Students from a user's Python file.

The folder of such a student names the function and contains the SHA-256 of the file, but not the file. Loading the
student executes the file, so the user must name it apart from the folder: by ``--student``, or in ``$REFILLED_CODE``.
"""

import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch

from refilled.errors import ModelError, RunError
from refilled.models.backbone import Backbone
from refilled.models.user_file import Function, UserBackbone, load_user_file
from refilled.words import count_of

CODE = "REFILLED_CODE"
"""Environment variable with the paths of trusted Python files, separated as those in ``$PATH``."""


def trust_user_file(text: str | None) -> None:
    """Let this process and its children load students from the file of ``FILE.py:FUNCTION``, which the user has named.

    Other names of a student, and None, change nothing.
    """
    if (function := Function.named(os.path.expandvars(text or ""))) is not None:
        path = str(function.path.absolute())
        others = [each for each in _trusted() if each != path]
        os.environ[CODE] = os.pathsep.join([path, *others])


def user_student(
    function: Function,
    num_classes: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
) -> tuple[Backbone, list[str]]:
    """Return the student that a user's function makes, with a fresh classifier, and notes for the user.

    The student has the weights that the function gives it. Its images are not resized, unless the function says to
    which ``input_size``.

    Args:
        function: The function, which the user has named.
        num_classes: Number of classes of the classifier.
        mean: Mean of each channel of the images on the scale [0, 1], if the file does not say which it expects.
        std: Standard deviation of each channel, on the same scale.
        image_size: Side length of the images in pixels.

    Raises:
        ModelError: The file does not make a network that can be trained.
    """
    path, name, _ = function
    student = load_user_file(*function, image_size=image_size, num_classes=num_classes, fallback=(mean, std))
    if student.channels != 3:
        raise ModelError(f"{path}: {name} returns a network for grayscale images, but students take RGB images")
    notes = [note.replace("the teacher", "the student") for note in student.notes]
    student.notes = ()
    if isinstance(student, UserBackbone):
        if isinstance(student.module, torch.jit.ScriptModule | torch.fx.GraphModule):
            raise ModelError(f"{path}: {name} returns a compiled program; a student must be an ordinary module")
        student.replace_classifier(num_classes)
    frozen = sum(not parameter.requires_grad for parameter in student.parameters())
    if frozen:
        notes.append(f"{path.name} has frozen {count_of(frozen, 'tensor')} of the student, which stay as they are")
    student.train()
    student.architecture = function.within(path.name)
    student.image_size = image_size
    student.code = sha256(path.read_bytes()).hexdigest()
    trust_user_file(function.within(path))
    return student, notes


def rebuilt(
    function: Function,
    code: object,
    num_classes: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    input_size: int | None,
    image_size: int,
) -> Backbone:
    """Rebuild the student of a function that a description names, with the weights that the function gives it.

    The file is the trusted one of the same name.

    Raises:
        RunError: The user has not named the file.
        ModelError: It has changed.
    """
    path = _find(function.path.name)
    if sha256(path.read_bytes()).hexdigest() != code:
        raise ModelError(f"{path} has changed since the student was trained; restore it")
    student, _ = user_student(function._replace(path=path), num_classes, mean=mean, std=std, image_size=image_size)
    student.set_preprocessing(mean, std)
    if input_size != student.input_size:
        student.set_preprocessing(input_size=input_size)
    return student


def _trusted() -> list[str]:
    return [each for each in os.environ.get(CODE, "").split(os.pathsep) if each]


def _find(name: str) -> Path:
    for path in (Path(each).expanduser() for each in _trusted()):
        if path.name == name and path.is_file():
            return path
    raise RunError(
        f"the student is a network from the Python file {name}, which loading it would execute. If you trust that "
        f"file, set {CODE} to its path"
    )
