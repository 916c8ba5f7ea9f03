"""Teachers from a student folder, timm, transformers, a weight file, or a user's Python file."""

from collections.abc import Sequence
from pathlib import Path

from refilled.errors import ModelError
from refilled.models.architectures import is_architecture
from refilled.models.backbone import Backbone, Pooling, freeze
from refilled.models.embedded import PREFIX, embedded_folder, embedded_teachers
from refilled.models.folder import DESCRIPTION, load_model
from refilled.models.hugging_face import load_hugging_face
from refilled.models.timm_backbone import TimmBackbone, timm_model
from refilled.models.user_file import Function, load_user_file
from refilled.models.weights import SUFFIXES, open_weights, why_no_weights

_FORMS = (
    "a student folder, refilled/letters, timm/<name>, hf:<folder or name>, <architecture>:WEIGHTS, or FILE.py:FUNCTION"
)


def load_teacher(
    text: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    image_size: int | None = None,
    pooling: Pooling | None = None,
) -> Backbone:
    """Load and freeze the teacher that ``text`` names.

    ======================================  =====================================================================
    ``runs/teacher``                        a folder that a run or :func:`save_model` wrote
    ``refilled/letters``                    a small teacher of printed letters that comes with the package
    ``timm/resnet50``                       a timm model with its published weights
    ``timm/resnet50:weights.safetensors``   a timm model with weights from a file
    ``hf:folder``, ``hf:name``              an image network of transformers, with its image processor's mean, std, size
    ``wrn_40_2:teacher.pth``                an architecture of ours with weights from a file
    ``wrn_40_2:teacher.pth#student``        one of several sets of weights in a file; see :func:`read_weights`
    ``mine.py:make``, ``mine.py:make:arg``  the model that a user's function returns; see :func:`load_user_file`
    ======================================  =====================================================================

    Weight files are read only as tensors (safetensors, or ``torch.load(weights_only=True)``). The number of classes is
    that of the weights. A user's Python file is executed.

    Args:
        text: One of the forms above.
        mean: Mean of each channel that the teacher expects, on the scale [0, 1]; required if it is not known.
        std: Standard deviation of each channel, on the same scale.
        input_size: Side length in pixels of the teacher's input. None: the size of its training, if known, otherwise
            that of the images. Vision transformers with a variable size take the larger of ``image_size`` and 224
            pixels, but no more than they were trained at.
        image_size: Side length of the images of the task; None if not known.
        pooling: The output that is the embedding: ``pooled``, ``token``, ``mean`` or ``both``; see
            :class:`~refilled.models.timm_backbone.TimmBackbone`. None: the output trained to represent the image.

    Raises:
        ModelError: The teacher does not exist, or the normalisation of its images is not known.
    """
    if (function := Function.named(text)) is not None:
        teacher = load_user_file(*function, mean=mean, std=std, input_size=input_size, image_size=image_size)
    elif ((folder := embedded_folder(text) or Path(text)) / DESCRIPTION).is_file():
        teacher = load_model(folder)
        teacher.set_preprocessing(mean, std, input_size or _trained_size(teacher, image_size))
        return _with_pooling(teacher, pooling or teacher.pooling)
    elif text.startswith("hf:"):
        teacher = load_hugging_face(text.removeprefix("hf:"), mean, std, input_size)
        if input_size is None:
            teacher.adapt_size(image_size)
    else:
        teacher = _load(text, known_normalization=mean is not None and std is not None)
        teacher.set_preprocessing(mean, std, input_size)
        if input_size is None:
            teacher.adapt_size(image_size)
    return _with_pooling(teacher, pooling or teacher.default_pooling())


def _trained_size(teacher: Backbone, image_size: int | None) -> int | None:
    """Return the size at which a student from a folder was trained, if the task's images have another one."""
    trained = teacher.image_size
    if teacher.input_size is not None or trained is None or image_size in (None, trained):
        return None
    teacher.notes += (f"the teacher sees {trained} pixels, as in its training; --teacher-size sets another size",)
    return trained


def _with_pooling(teacher: Backbone, pooling: Pooling) -> Backbone:
    teacher.set_pooling(pooling)
    return freeze(teacher)


def _load(text: str, known_normalization: bool) -> Backbone:
    architecture, colon, file = text.partition(":")
    of_timm = architecture.startswith("timm/")
    if colon and not (of_timm or known_normalization):
        raise ModelError(f"{text} does not say how its images were normalised: give --teacher-mean and --teacher-std")
    if colon:
        notes: list[str] = []
        teacher = open_weights(architecture, file, notes.append)
        teacher.notes = tuple(notes)
        return teacher
    if not of_timm:
        raise ModelError(f"'{text}' is not a teacher: {_why_not(text)}")
    teacher = TimmBackbone(timm_model(architecture.removeprefix("timm/"), pretrained=True))
    teacher.architecture = architecture
    return teacher


def _why_not(text: str) -> str:
    if text.startswith(PREFIX):
        return f"the package comes with {', '.join(embedded_teachers())} only"
    path = Path(text)
    if path.is_dir():
        return f"the folder contains no {DESCRIPTION}"
    if path.suffix == ".py":
        return f"add the function that makes it, as in {text}:FUNCTION"
    if path.is_file() and (reason := why_no_weights(path)):
        return reason
    if path.is_file() or path.suffix in SUFFIXES:
        return f"a weight file does not name its architecture; give <architecture>:{text}, as in wrn_40_2:{text}"
    if is_architecture(text):
        return f"an architecture needs weights; give {text}:WEIGHTS"
    return f"there is no such file or folder; a teacher is {_FORMS}"
