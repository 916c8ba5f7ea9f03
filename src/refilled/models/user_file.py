"""Networks from a user's Python file."""

import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from refilled.errors import ModelError, unknown
from refilled.models.backbone import Backbone, NoClassifier, Pooling
from refilled.models.module_outputs import LinearCall, find_last_linear, linear_calls, read_embedding
from refilled.models.timm_backbone import TimmBackbone
from refilled.words import count_of

_PROBE_SIZE = 64  # pixels, if the input size is not fixed


class UserBackbone(Backbone):
    """A user's module as a teacher.

    The embedding is the output of ``forward_features``, or of ``embed``. If the module has neither, it is the output of
    the module; if a linear layer computes this output, the embedding is the input of the layer, and the layer is the
    classifier. :func:`~refilled.models.module_outputs.read_embedding` describes possible outputs and their pooling. The
    module runs in float32, whatever the type of its weights.

    Args:
        module: The module.
        mean: Mean of each channel that the module expects, on the scale [0, 1].
        std: Standard deviation of each channel, on the same scale.
        input_size: Side length in pixels that images are resized to; None: no resizing.
        image_size: Side length of the images of the task, for a module that takes only one size.

    Raises:
        ModelError: The module returns no embedding.
    """

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        input_size: int | None = None,
        image_size: int | None = None,
    ) -> None:
        halved = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32}
        module.float().cpu().eval()
        images = _made_up(input_size or image_size or _PROBE_SIZE)
        with torch.no_grad():
            images, last = _fitting(module, images, channels=len(mean))
            embedding = last.input if last is not None else _embedding(module, images)
            classifier = last.layer if last is not None else _classifier(module, images, embedding)
        super().__init__(embedding.shape[1], (), 0, mean, std, input_size, channels=images.shape[1])
        self.module, self._images = module, images
        layers = {layer: name for name, layer in module.named_modules()}
        self._last = None if last is None else layers[last.layer]  # whose input is the embedding
        if classifier is not None:
            self.classifier, self.num_classes = classifier, classifier.out_features
        if last is not None:
            self.notes += (
                f"the teacher's module ends in a linear layer of {last.layer.out_features} outputs; the embedding is "
                f"the input of this layer, {embedding.shape[1]} numbers. A method 'embed' of the module sets another",
            )
        if last is None and isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
            self.notes += (
                f"the teacher's compiled program cannot be inspected: its output of {embedding.shape[1]} numbers is "
                "the embedding. If these are class scores, compile a module that returns the input of the classifier",
            )
        self.notes += tuple(
            f"the teacher's module was {str(d).removeprefix('torch.')}; it runs in float32" for d in halved
        )

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map normalised images to the module's embedding ``(N, d)``; there are no feature maps."""
        if self._last is None:
            return _embedding(self.module, images, self.pooling), ()
        last = self.module.get_submodule(self._last)
        with linear_calls(self.module) as calls:
            self.module(images)
        return next(call.input for call in reversed(calls) if call.layer is last), ()

    def replace_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one, and remove the old one from the module where that is possible."""
        if self._last is not None:
            with torch.no_grad():
                self._remove(self._last)
        self.classifier, self.num_classes = nn.Linear(self.embedding_dim, num_classes), num_classes
        self.class_names = None

    def _remove(self, name: str) -> None:
        expected, _ = self.embed(self._images)
        parent, _, own = name.rpartition(".")
        holder, layer = self.module.get_submodule(parent), self.module.get_submodule(name)
        setattr(holder, own, nn.Identity())
        try:
            found = _embedding(self.module, self._images)
        except (ModelError, RuntimeError):  # of a module that returns nothing like rows without it
            found = None
        if found is not None and torch.equal(found, expected):
            self._last = None
        else:
            setattr(holder, own, layer)

    def set_pooling(self, pooling: Pooling) -> None:
        """Choose the embedding of a module that returns tokens; the classifier is removed."""
        if pooling == self.pooling:
            return
        with torch.no_grad():
            embedding = _embedding(self.module, self._images, pooling)
        self.pooling, self._last, self.embedding_dim = pooling, None, embedding.shape[1]
        self.classifier, self.num_classes, self.class_names = NoClassifier(), 0, None


def _made_up(side: int) -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * side * side).view(2, 3, side, side)


def _fitting(module: nn.Module, images: Tensor, channels: int) -> tuple[Tensor, LinearCall | None]:
    """Return the images that the module takes, RGB or grayscale, and its final linear layer."""
    if channels == 1:
        return images[:, :1], _last_linear(module, images[:, :1])
    try:
        return images, _last_linear(module, images)
    except RuntimeError as error:
        try:
            return images[:, :1], _last_linear(module, images[:, :1])
        except RuntimeError:
            raise error from None  # the number of channels was not the cause


def _last_linear(module: nn.Module, images: Tensor) -> LinearCall | None:
    name, embed = _embedder(module)
    with linear_calls(module) as calls:
        output = embed(images)
    return find_last_linear(output, calls) if name == "forward" else None


def _embedding(module: nn.Module, images: Tensor, pooling: Pooling = "pooled") -> Tensor:
    name, embed = _embedder(module)
    try:
        return read_embedding(embed(images), pooling)
    except ModelError as error:
        raise ModelError(f"what the {name} of the teacher returns: {error}") from None


def _embedder(module: nn.Module) -> tuple[str, Callable[[Tensor], Any]]:
    for name in ("forward_features", "embed"):
        if callable(embed := getattr(module, name, None)):
            return name, embed
    return "forward", module


def _classifier(module: nn.Module, images: Tensor, embedding: Tensor) -> nn.Linear | None:
    """Return the linear layer that computes the module's output from the embedding."""
    candidates = [m for m in module.modules() if isinstance(m, nn.Linear) and m.in_features == embedding.shape[1]]
    if not candidates:
        return None
    try:
        output = module(images)
    except NotImplementedError:  # a module that only embeds
        return None
    for linear in candidates:
        logits = linear(embedding)
        if isinstance(output, Tensor) and output.shape == logits.shape and torch.allclose(output, logits, atol=1e-4):
            return linear
    return None


class Function(NamedTuple):
    """A function in a user's Python file, and the text that it is called with, if any."""

    path: Path
    name: str
    argument: str | None

    @classmethod
    def named(cls, text: str) -> Self | None:
        """Read ``FILE.py:FUNCTION`` or ``FILE.py:FUNCTION:ARGUMENT``; None if the text has another form."""
        match = re.fullmatch(r"(.+?\.py):(\w+)(?::(.*))?", text, re.DOTALL)
        return None if match is None else cls(Path(match[1]).expanduser(), match[2], match[3])

    def within(self, path: Path | str) -> str:
        """Return the text that names the function in the file at another path."""
        return ":".join((str(path), self.name, *(() if self.argument is None else (self.argument,))))


def load_user_file(
    path: Path,
    function: str,
    argument: str | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    fallback: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Backbone:
    """Call ``function``, with ``argument`` as a string if there is one, and return a teacher from its result.

    The function returns a module, or a module and a dict. Values that are None here are read from the module's
    attributes ``mean``, ``std`` and ``input_size``, or from these keys of the dict. The class names are the attribute
    ``class_names`` or the key ``labels``. A timm model becomes a :class:`TimmBackbone`, and timm's mean, std and input
    size are the defaults.

    A student has ``num_classes`` and, if nothing else says how its images are normalised, the mean and std of
    ``fallback``. A timm model then has a fresh classifier, and sees images at their own size unless it takes only one.

    Raises:
        ModelError: The user's code fails (the message has file and line), it returns something else, or mean and std
            are not given.
    """
    with _errors_in(path):
        result = _call(path, function, argument)
    module, about = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if isinstance(module, torch.export.ExportedProgram):
        module = _runnable(module)
    if not isinstance(module, nn.Module) or not isinstance(about, Mapping):
        raise ModelError(
            f"{path}: {function} must return a torch.nn.Module, or a module and a dict, not {result!r:.80}"
        )
    with _errors_in(path):
        mean = mean or _numbers("mean", module, about, path)
        std = std or _numbers("std", module, about, path)
        sizes = _numbers("input_size", module, about, path)  # may be (3, H, W)
        input_size = input_size or (int(sizes[-1]) if sizes else None)
        if hasattr(module, "pretrained_cfg") and hasattr(module, "forward_head"):
            teacher = _of_timm(module, mean, std, input_size, image_size, num_classes)
        else:
            mean, std = (mean, std) if mean and std else fallback or (mean, std)
            teacher = _of_module(module, mean, std, input_size, image_size, path)
        teacher.class_names = _class_names(teacher, module, about, path)
    return teacher


def _runnable(program: torch.export.ExportedProgram) -> nn.Module:
    """Return the module of an exported program, which behaves the same in training and evaluation mode."""
    module = program.module()

    def stay(mode: bool = True) -> nn.Module:
        return module

    module.train, module.eval = stay, stay  # type: ignore[method-assign, assignment]  # they would raise
    return module


def _call(path: Path, function: str, argument: str | None) -> Any:
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    name = f"refilled_teacher_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = user_module = importlib.util.module_from_spec(spec)  # data classes look up their module there
    sys.path.insert(0, str(path.resolve().parent))  # the file may import modules next to it, as a script does
    try:
        spec.loader.exec_module(user_module)
        make = getattr(user_module, function, None)
        if not callable(make):
            own = [key for key, value in vars(user_module).items() if getattr(value, "__module__", None) == name]
            raise ModelError(f"{path}: {unknown('function', function, own)}")
        return make() if argument is None else make(argument)
    finally:
        sys.path.remove(str(path.resolve().parent))


@contextmanager
def _errors_in(path: Path) -> Iterator[None]:
    """Convert an error of the user's code to one line with its position in the user's file."""
    try:
        yield
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        if isinstance(error, SyntaxError):
            lines.append(error.lineno)
        place = f"{path}:{lines[-1]}" if lines else str(path)
        raise ModelError(f"{place}: {type(error).__name__}: {error}") from error


def _of_timm(
    module: nn.Module,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    input_size: int | None,
    image_size: int | None,
    num_classes: int | None,
) -> Backbone:
    network = TimmBackbone(module, num_classes)
    network.set_preprocessing(mean, std, input_size)
    if input_size is None:
        network.adapt_size(image_size)
    return network


def _of_module(
    module: nn.Module,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    input_size: int | None,
    image_size: int | None,
    path: Path,
) -> Backbone:
    if mean is None or std is None:
        raise ModelError(
            f"{path} does not say how its teacher's images are normalised: give --teacher-mean and --teacher-std, or "
            "let the function return (module, {'mean': [0.5, 0.5, 0.5], 'std': [0.5, 0.5, 0.5]})"
        )
    return UserBackbone(module, mean, std, input_size, image_size)


def _numbers(name: str, module: nn.Module, about: Mapping[str, Any], path: Path) -> list[float] | None:
    value = getattr(module, name, None)
    value = about.get(name) if value is None else value
    if value is None:
        return None
    try:
        return torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: the {name} of the teacher must be numbers, not {value!r:.80}") from error


def _class_names(teacher: Backbone, module: nn.Module, about: Mapping[str, Any], path: Path) -> tuple[str, ...] | None:
    given = getattr(module, "class_names", None)
    given = about.get("labels") if given is None else given
    if given is None or teacher.num_classes == 0:
        return None
    names = _in_order(given) if isinstance(given, Mapping) else tuple(map(str, given))
    if len(names) != teacher.num_classes:
        wanted = count_of(teacher.num_classes, "class")
        raise ModelError(f"{path}: {count_of(len(names), 'class name')} for the {wanted} of the teacher")
    return names


def _in_order(names: Mapping[Any, Any]) -> tuple[str, ...]:
    """Return the names of a mapping between numbers and names, ordered by number; otherwise its values."""
    for pairs in (list(names.items()), [(number, name) for name, number in names.items()]):
        if all(str(number).isdecimal() for number, _ in pairs):
            return tuple(str(name) for _, name in sorted(pairs, key=lambda pair: int(pair[0])))
    return tuple(map(str, names.values()))
