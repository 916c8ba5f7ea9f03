"""Weight files: read without running anything that they contain, and loaded whole or not at all."""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from refilled.errors import ModelError

SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")
"""What the names of weight files end in."""

_PREFIXES = ("_orig_mod.", "module.")  # of compiled models, and of models on several devices
_NESTS = ("state_dict", "model", "model_state_dict", "net")
_SHOWN = 4  # names in a message, so that it stays readable


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict, out of the nest and without the prefixes that training scripts leave on it.

    Args:
        path: A safetensors file, or one that :func:`torch.save` wrote; pickled code in it is refused.

    Raises:
        ModelError: when the file cannot be read, or holds something else.
    """
    content = _read(path)
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{path} holds no state dict (tensors by name), but {type(content).__name__}")
    names = [str(name) for name in content]
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in names):
            names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, content.values(), strict=True))


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"there is no weight file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors, or something else altogether; running code out of a weight file is "
            "refused. Save the state dict alone: torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # damaged bytes make the readers fail in every which way
        raise ModelError(f"{path} cannot be read as weights: {type(error).__name__}: {error!s:.200}") from error


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load the weights into the model if they fit in name and shape, every one of them.

    Raises:
        ModelError: naming the first few that are missing, left over or of another shape.
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
    model.load_state_dict(weights, strict=False)  # old files lack num_batches_tracked, which nothing reads


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (", ..." if len(listed) > _SHOWN else "")
