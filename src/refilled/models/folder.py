"""Models in folders, with the weights and a description from which the architecture is rebuilt.

A folder contains ``model.safetensors`` and ``model.json``. Reading them cannot run code.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from refilled.errors import ModelError
from refilled.files import write_atomic
from refilled.models.architectures import describe, from_description
from refilled.models.backbone import Backbone

SCHEMA = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"

_NOT_THERE = (FileNotFoundError, NotADirectoryError)


def save_model(model: Backbone, folder: Path) -> None:
    """Write the model to the folder, which is created if necessary.

    Each of the two files is written atomically. The description is written last and contains the SHA-256 of the
    weights, so that files of two different models are never combined.

    Raises:
        ModelError: The model was not built by name, or the folder cannot be written.
    """
    description = describe(model)
    # Copies, because safetensors supports neither channels-last nor shared memory.
    state = {
        name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()
    }
    weights = save(state)
    document = {"schema": SCHEMA, **description, "sha256": sha256(weights).hexdigest()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / WEIGHTS, weights)
        write_atomic(folder / DESCRIPTION, json.dumps(document, indent=2).encode())
    except OSError as error:
        raise ModelError(f"the model ({len(weights):,} bytes) cannot be written to {folder}: {error}") from error


def load_model(folder: Path) -> Backbone:
    """Load a model that :func:`save_model` wrote, in evaluation mode.

    Raises:
        ModelError: A file is missing or damaged, or the two files do not fit each other.
    """
    document = _read_description(folder / DESCRIPTION)
    path = folder / WEIGHTS
    weights = _read(path)
    if sha256(weights).hexdigest() != document.get("sha256"):
        raise ModelError(f"{path} is damaged, or belongs to another {DESCRIPTION}: the checksums differ")
    try:
        model = from_description(document)
        model.load_state_dict(load(weights))
    except (SafetensorError, RuntimeError, ModelError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{folder / DESCRIPTION} describes no usable model: {error}") from error
    return model.eval()


def classes_of(folder: Path) -> list[str]:
    """Return the names of the classes of a model that :func:`save_model` wrote; empty if they are not known.

    Raises:
        ModelError: The description is missing or damaged.
    """
    return _read_description(folder / DESCRIPTION).get("classes") or []


def _read_description(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ModelError(f"{path} does not describe a model in a format that this version of refilled supports")
    return document


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        hint = "; give the folder of a finished run" if isinstance(error, _NOT_THERE) else ""
        raise ModelError(f"{path} cannot be read: {error.strerror}{hint}") from error
