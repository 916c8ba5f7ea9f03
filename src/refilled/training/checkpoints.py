"""Training states that can be picked up exactly where they were put down.

A state is one file: safetensors (so that loading it runs no code), followed by the SHA-256 digest of what
stands before. The previous state is kept next to the last one and is used if the last one is damaged.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from refilled.errors import CheckpointError, InUseError
from refilled.files import sync_folder, write_atomic
from refilled.locks import lock

SCHEMA = 1
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_DATA = "state.json"  # plain data travels inside the same file, as bytes
_DIGEST_SIZE = sha256().digest_size


class State(NamedTuple):
    """Everything that training needs to resume: tensors by name, and plain data."""

    tensors: dict[str, Tensor]
    data: dict[str, Any]


def save_state(folder: Path, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
    """Write the state so that at every instant a whole one, no older than the one before, lies in the folder."""
    plain = json.dumps({"schema": SCHEMA, **data}).encode()
    packed = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    packed[_DATA] = torch.frombuffer(bytearray(plain), dtype=torch.uint8)
    body = save(packed)
    last = folder / LAST
    if last.exists():
        # A hard link and not a rename: `last` must not vanish while the new state is being written.
        link = folder / f".{PREVIOUS}.tmp"
        link.unlink(missing_ok=True)
        os.link(last, link)
        link.replace(folder / PREVIOUS)
    write_atomic(last, body + sha256(body).digest())


def load_state(folder: Path) -> tuple[State | None, list[str]]:
    """Return the newest whole state, or None if nothing was saved yet, and what is wrong with any damaged one.

    Raises:
        CheckpointError: states were saved, but none of them is whole.
    """
    problems: list[str] = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            return _read(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"no saved state in {folder} can be used: {'; '.join(problems)}. "
            f"Start the run again with --overwrite, or restore {LAST} from a backup."
        )
    return None, problems


def _read(path: Path) -> State:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    body, digest = content[:-_DIGEST_SIZE], content[-_DIGEST_SIZE:]
    if sha256(body).digest() != digest:
        raise CheckpointError(f"{path} is damaged: its checksum does not match")
    try:
        tensors = load(body)
        data = json.loads(tensors.pop(_DATA).numpy().tobytes())
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} holds no training state ({error})") from error
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
        raise CheckpointError(f"{path} was written by another version of refilled")
    return State(tensors, data)


@contextmanager
def refusing_another_state() -> Iterator[None]:
    """Explain a state that is whole, but of another network or optimiser."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"the saved state belongs to another run: its content does not fit this one ({type(error).__name__}: "
            f"{reason}). Restore last.ckpt of this run, or start again with --overwrite"
        ) from error


def discard_states(folder: Path) -> None:
    """Remove the saved states of a finished run, and what interrupted writes left behind."""
    for name in (LAST, PREVIOUS):
        (folder / name).unlink(missing_ok=True)
    discard_leftovers(folder)


def discard_leftovers(folder: Path) -> None:
    """Remove what interrupted writes left behind in a run's folder, which this process holds."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("stages/.*.tmp")]:
        path.unlink(missing_ok=True)
    sync_folder(folder)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process alone; the system lets go of it when the process ends, however it ends.

    Raises:
        InUseError: another process holds it; the message names its process id.
    """
    with (folder / ".lock").open("a+") as file:
        if not lock(file, wait=False):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise InUseError(f"{folder} is in use by process {holder}; wait for it, or choose another --out")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
