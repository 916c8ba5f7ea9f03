"""Weight files. Reading never runs code from the file; loading is complete or fails."""

import argparse
import math
import pickle
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from refilled.errors import ModelError
from refilled.models.architectures import create_model, is_architecture
from refilled.models.backbone import Backbone
from refilled.models.timm_backbone import TimmBackbone, first_convolution, timm_classifiers, timm_model
from refilled.words import count_of

SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")
"""The suffixes of weight files."""

Say = Callable[[str], None]

_AVERAGED = (
    *("state_dict_ema", "ema_state_dict", "model_ema", "model_ema_state_dict", "ema_model", "ema", "params_ema"),
    *("averaged_model", "swa_model", "teacher", "shadow"),
)
_LATEST = (
    *("state_dict", "model", "model_state_dict", "model_state", "net", "net_state_dict", "network", "params"),
    *("weights", "module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "backbone", "encoder"),
    *("base_model", "trunk", "student"),
)
_WRAPPERS = (*_AVERAGED, *_LATEST)
"""Dict keys or name prefixes under which training scripts save weights, in order of preference."""

_BESIDE = (
    *("n_averaged", "criterion", "loss", "loss_fn", "head", "heads", "fc", "classifier", "decoder", "neck"),
    *("projector", "projection_head", "predictor", "prototypes", "dino_head", "ibot_head", "dino_loss", "queue"),
)
"""Names that may occur next to a network in the state dict of a whole training module."""

_INSIDE = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that result from compiling, sharding or checkpointing a part of a network."""

_NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # the function moved with NumPy 2; files may have either name
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    *((_NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""Plain data that training scripts save with the weights: options and NumPy numbers."""

_ABOUT = "{'mean': [0.5, 0.5, 0.5], 'std': [0.5, 0.5, 0.5]}"  # an example

_SHOWN = 4  # names in a message, so that it stays readable
_KEYS_SHOWN = 8
_KINDS = {"weight", "bias", "running_mean", "running_var"}  # torch's names; two of them never mean the same


def read_weights(
    path: Path, branch: str | None = None, say: Say = lambda text: None, network: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return the tensors of a weight file by name, without the wrappers of training scripts.

    The bytes of the file determine its format, not its name. Dicts around the state dict and prefixes shared by all
    names are removed repeatedly. If there are several sets of weights, averaged ones (exponential moving average,
    DINO's teacher) are preferred to the latest ones, as timm and DINO do in evaluation.

    Args:
        path: A safetensors file, or a file that :func:`torch.save` wrote. Pickled code is refused.
        branch: The set of weights to use if there are several: a key such as ``"model"`` or ``"student"``, or several
            keys joined by dots. None: the averaged weights, if there are any.
        say: Called with notes for the user about the chosen set, omitted tensors and conversions.
        network: The tensor names of the network of the weights, if known. These names are not regarded as wrapped, even
            if they start like a wrapper (``encoder.``).

    Returns:
        Tensors on the CPU; floating-point tensors are float32.

    Raises:
        ModelError: The file cannot be read, contains no state dict, contains several without a clear choice, or
            contains values that are not finite.
    """
    content = _read(path)
    weights = _in_float32(_unwrapped(content, path, branch, say, network), path, say)
    _refuse_non_finite(weights, path)
    return weights


def open_weights(architecture: str, file: str, say: Say = lambda text: None) -> Backbone:
    """Build the model of ``ARCHITECTURE:FILE``, with the number of classes of the weights.

    Args:
        architecture: ``timm/<name>``, or a name that :func:`create_model` knows.
        file: A weight file. ``FILE#BRANCH`` chooses one of several sets of weights in it; see :func:`read_weights`.
        say: Called with notes for the user.

    Raises:
        ModelError: The architecture or file does not exist, or they do not fit each other.
    """
    if not is_architecture(architecture):
        create_model(architecture, 1)  # raises an error about the name
    path, branch = path_and_branch(file)
    if architecture.startswith("timm/"):
        of_timm = _open_timm(architecture.removeprefix("timm/"), path, branch, say)
        of_timm.architecture = architecture
        return of_timm
    weights = in_our_names(read_weights(path, branch, say))
    if "classifier.weight" not in weights:
        raise ModelError(
            f"{path} contains no classifier.weight, so it is not a whole {architecture}; it has {_first(weights)}"
        )
    model = create_model(architecture, len(weights["classifier.weight"]))
    load_weights(model, weights, str(path))
    return model


def why_no_weights(path: Path) -> str | None:
    """Return why the weights of a file cannot be read; None if they can."""
    try:
        read_weights(path)
    except ModelError as error:
        return str(error)
    return None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load the weights into the model if all of them fit in name and shape.

    Raises:
        ModelError: Tensors are missing, unknown or of another shape; the message names the first few.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    left_over = [name for name in weights if name not in own]
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {_first(names)}"
        for what, names in (("missing", missing), ("not known to it", left_over), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ModelError(f"{source} does not fit the architecture: {'; '.join(problems)}")
    model.load_state_dict(weights, strict=False)  # old files lack num_batches_tracked, which is not used


def path_and_branch(file: str) -> tuple[Path, str | None]:
    """Split ``FILE#BRANCH``; the branch is None if there is none."""
    name, sharp, branch = file.rpartition("#")
    if not sharp or Path(file).exists():
        return Path(file), None
    return Path(name), branch


def in_our_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under our names, for files of published CIFAR models."""
    return {_our_name(name): value for name, value in weights.items()}


def _our_name(name: str) -> str:
    """Return our name of a tensor of published CIFAR models."""
    name = re.sub(r"^(fc|linear)\.", "classifier.", name)
    return name.replace(".layer.", ".").replace(".convShortcut.", ".shortcut.")


def _open_timm(name: str, path: Path, branch: str | None, say: Say) -> TimmBackbone:
    body = timm_model(name)
    weights = read_weights(path, branch, say, body.state_dict().keys())
    if options := _options_of(weights, body):
        body = timm_model(name, **options)
    classifiers = timm_classifiers(body)
    classifier, own = classifiers[0], without(classifiers, body.state_dict())
    weights = renamed_by_order(in_timm_names(weights, body), own, str(path), say, classifier)
    num_classes = len(weights.get(f"{classifier}.weight", ()))  # 0 for an extractor, which has no logits
    if num_classes != body.num_classes:
        body.reset_classifier(num_classes)
    load_weights(body, weights, str(path))
    return TimmBackbone(body)


def in_timm_names(weights: dict[str, Tensor], body: Any) -> dict[str, Tensor]:
    """Translate the names in the authors' files (DINOv2, CLIP, MAE, ...), as timm does after downloading them."""
    translate = getattr(sys.modules[type(body).__module__], "checkpoint_filter_fn", None)
    if translate is None or weights.keys() == body.state_dict().keys():
        return weights
    try:
        return dict(translate(dict(weights), body))
    except Exception:  # other names; loading reports those that do not fit
        return weights


def renamed_by_order(
    weights: dict[str, Tensor],
    own: Mapping[str, Tensor],
    source: str,
    say: Say,
    classifier: str | None = None,
) -> dict[str, Tensor]:
    """Rename the tensors of a file with the names of another library, if they are those of the network by their order.

    Number, order and shapes must be equal, and no tensor may be called ``bias`` where the network has a ``weight``, for
    example. A further weight and bias at the end are the classifier of the file. If a name agrees, or anything else
    does not, the weights are returned as they are.

    Args:
        weights: The tensors of the file.
        own: The tensors of the network, without its classifier.
        source: The file, for the note.
        say: Called with a note for the user if tensors are renamed.
        classifier: Name of the network's classifier, which the file's classifier is renamed to. None: it is left out.
    """
    given, names = _without_counters(weights), list(_without_counters(own))
    if own.keys() & weights.keys() or len(given) - len(names) not in (0, 2):
        return weights
    pairs = list(zip(names, given.items(), strict=False))
    if any(value.shape != own[name].shape or _of_another_kind(name, other) for name, (other, value) in pairs):
        return weights
    say(f"the names in {source} differ; its tensors were matched by order and shape")
    renamed = {name: value for name, (_, value) in pairs}
    if classifier is not None:
        rest = list(given.values())[len(names) :]
        renamed |= zip((f"{classifier}.weight", f"{classifier}.bias"), rest, strict=False)
    return renamed


def _without_counters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors except the counters of batch norm, which old files lack and nothing uses."""
    return {name: value for name, value in weights.items() if value.ndim > 0 or value.is_floating_point()}


def _of_another_kind(name: str, other: str) -> bool:
    ends = {text.rpartition(".")[2] for text in (name, other)}
    return len(ends) > 1 and ends <= _KINDS


def without(modules: Collection[str], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors except those of the named modules."""
    return {name: value for name, value in weights.items() if name.rpartition(".")[0] not in modules}


def _options_of(weights: Mapping[str, Tensor], body: Any) -> dict[str, Any]:
    """Return the options with which the network of the weights was built, if they differ from timm's defaults."""
    options: dict[str, Any] = {}
    first = first_convolution(body)
    kernel = None if first is None else weights.get(f"{first}.weight")
    if kernel is not None and kernel.ndim == 4 and kernel.shape[1] != body.get_submodule(first).weight.shape[1]:
        options["in_chans"] = kernel.shape[1]
    positions, own = weights.get("pos_embed"), getattr(body, "pos_embed", None)
    if positions is not None and isinstance(own, Tensor) and own.ndim == 3 and positions.shape[1] != own.shape[1]:
        prefix = own.shape[1] - math.prod(body.patch_embed.grid_size)
        options["img_size"] = math.isqrt(max(positions.shape[1] - prefix, 1)) * body.patch_embed.patch_size[0]
    return options


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"there is no weight file {path}")
    with path.open("rb") as file:
        start = file.read(512)
    _refuse_other_formats(path, start)
    try:
        if _is_safetensors(start, path.stat().st_size):
            return load_file(path)
        with (
            torch.serialization.safe_globals(_HARMLESS),
            path.open("rb") as file,
        ):  # torch.load would judge a path by its suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path} {_why_refused(str(error))}") from error
    except Exception as error:  # damaged bytes make the readers raise many types
        raise ModelError(f"{path} cannot be read as weights: {type(error).__name__}: {error!s:.200}") from error


def _is_safetensors(start: bytes, size: int) -> bool:
    """Return whether the bytes start like safetensors: 8 bytes of header length, then the JSON header."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def _refuse_other_formats(path: Path, start: bytes) -> None:
    text = start.lstrip().lower()
    signs = {
        "is empty": not start,
        "is a Git LFS pointer and not the file itself; fetch it with 'git lfs pull'": text.startswith(
            b"version https://git-lfs"
        ),
        "is a web page; download the file itself": text.startswith((b"<!doctype", b"<html")),
        "is an HDF5 file (Keras, MATLAB), which PyTorch cannot read": start.startswith(b"\x89HDF"),
        "is compressed with gzip; unpack it first": start.startswith(b"\x1f\x8b"),
        "is a tar archive, of an old torch.save or of a folder; unpack it, or save it with a newer PyTorch": start[
            257:262
        ]
        == b"ustar",
    }
    for sign, holds in signs.items():
        if holds:
            raise ModelError(f"{path} {sign}")
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if what := _other_archive(names):
            raise ModelError(f"{path} {what}")


def _other_archive(names: list[str]) -> str | None:
    """Return what a zip archive is, if :func:`torch.save` did not write it."""
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        return (
            "is a TorchScript program and not a file of weights. Opening it would run its code, which is refused. "
            "If you trust it, let a Python file open it, as in mine.py:load with "
            f"'def load(): return torch.jit.load(FILE), {_ABOUT}', or save its weights: "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    if any("exported_program" in name or name.endswith("archive_format") for name in names):
        return (
            "is a program of torch.export and not a file of weights. If you trust it, let a Python file open it, as "
            f"in mine.py:load with 'def load(): return torch.export.load(FILE), {_ABOUT}', or save its weights: "
            "torch.save(torch.export.load(FILE).state_dict, NEW)"
        )
    if all(name.endswith(".npy") for name in names):
        return (
            "is an archive of NumPy arrays; save them as tensors with torch.save({name: torch.from_numpy(array)}, NEW)"
        )
    if not any(name.endswith("data.pkl") for name in names):
        return f"is an archive of other files ({_first(names)}); unpack it first"
    return None


def _why_refused(error: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", error)
    if found is None:
        return "holds no weights that PyTorch can read: its bytes are in another format or damaged"
    return (
        f"holds more than tensors: a Python object of {found[1]}. Opening it would run code, which is refused. Where "
        "you trust the file, save the state dict alone: torch.save(model.state_dict(), FILE)"
    )


def _unwrapped(content: Any, path: Path, branch: str | None, say: Say, network: Collection[str]) -> dict[str, Tensor]:
    """Remove dicts and prefixes around the state dict repeatedly."""
    wanted = branch.split(".") if branch else []
    taken: list[str] = []
    whole = content
    while options := _options(content, wanted[0] if wanted else None, network):
        key = _choice(options, path, wanted, taken)
        others = [name for name in options if name != key]
        if others and not wanted:
            say(f"{path}: '{key}' is used and {', '.join(others)} not; {path}#NAME chooses another")
        if wanted and key == wanted[0]:
            wanted.pop(0)
        taken.append(key)
        content = options[key]
    if not _is_state_dict(content):
        raise ModelError(f"{path} holds no state dict (tensors by name), but {_described(content)}")
    if wanted:
        raise ModelError(f"{path} has no weights under '{branch}'; it holds {_described(whole)}")
    return {_INSIDE.sub("", str(name)): value for name, value in content.items()}


def _options(content: Any, wanted: str | None, network: Collection[str]) -> dict[str, Any]:
    """Return the sets of weights in ``content`` by key or prefix; empty if it is itself a state dict."""
    if not isinstance(content, Mapping):
        return {}
    if not _is_state_dict(content):
        return {str(key): value for key, value in content.items() if _leads_to_weights(value)}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in content.items():
        first, _, rest = str(name).partition(".")
        groups.setdefault(first, {})[rest] = value
    sets = {first: group for first, group in groups.items() if "" not in group}
    fits = sum(name in network for name in content) > len(content) / 2
    wrapped = not fits and any(first in _WRAPPERS for first in sets) and groups.keys() <= {*_WRAPPERS, *_BESIDE}
    return sets if wrapped or wanted in sets else {}


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def _leads_to_weights(content: Any) -> bool:
    if not isinstance(content, Mapping) or "param_groups" in content:  # the state of an optimizer
        return False
    return _is_state_dict(content) or any(_leads_to_weights(value) for value in content.values())


def _choice(options: Mapping[str, Any], path: Path, wanted: list[str], taken: list[str]) -> str:
    if wanted and wanted[0] in options:
        return wanted[0]
    known = [name for name in _WRAPPERS if name in options]
    if known or len(options) == 1:
        return (known or list(options))[0]
    example = ".".join([*taken, next(iter(options))])
    raise ModelError(
        f"{path} holds several sets of weights: {', '.join(options)}. Choose one with #, as in {path}#{example}"
    )


def _described(content: Any) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    if not content:
        return "an empty dict"
    listed = [str(key) for key in content]
    return f"a dict of {', '.join(listed[:_KEYS_SHOWN])}" + (", ..." if len(listed) > _KEYS_SHOWN else "")


def _refuse_non_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    counts = {
        name: int((~value.isfinite()).sum())
        for name, value in weights.items()
        if value.is_floating_point() and not value.isfinite().all()
    }
    if counts:
        shown = _first(
            f"{name} ({count} of {count_of(weights[name].numel(), 'number')})" for name, count in counts.items()
        )
        raise ModelError(
            f"{path} holds weights that are NaN or infinite, in {len(counts)} of {count_of(len(weights), 'tensor')}: "
            f"{shown}. The training that wrote it had failed; use an earlier checkpoint of it"
        )


def _in_float32(weights: dict[str, Tensor], path: Path, say: Say) -> dict[str, Tensor]:
    others = Counter(v.dtype for v in weights.values() if v.is_floating_point() and v.dtype != torch.float32)
    for dtype, count in others.items():
        tensors = count_of(count, "tensor was", "tensors were")
        say(f"{path}: {tensors} converted from {str(dtype).removeprefix('torch.')} to float32")
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (", ..." if len(listed) > _SHOWN else "")
