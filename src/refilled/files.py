"""Atomic writing of files, cells of tables, and exclusive locks on folders."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from refilled.errors import RunError
from refilled.locks import lock

T = TypeVar("T")


def cache_folder() -> Path:
    """Return the folder of data that can be recomputed: $REFILLED_CACHE, or ``~/.cache/refilled``."""
    return Path(os.environ.get("REFILLED_CACHE") or "~/.cache/refilled").expanduser()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically: readers see the old or the new bytes, also after a loss of power.

    Raises:
        OSError: The disk is full or not writable; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)
            error.wanted = len(data)  # type: ignore[attr-defined]  # for the message about a full disk
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def spreadsheet_cell(text: str) -> str:
    """Keep a spreadsheet from running a text that begins like a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def read_record(path: Path) -> str:
    """Read a text file that belongs to a run.

    Raises:
        RunError: It cannot be read, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{path} cannot be read: {(error.strerror or str(error)).lower()}; restore it, or repeat the run with "
            "--overwrite"
        ) from error
    except UnicodeDecodeError as error:
        raise RunError(damaged(path, "it is not text")) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object that belongs to a run.

    Raises:
        RunError: It cannot be read, or holds something else.
    """
    try:
        found = json.loads(read_record(path))
    except (ValueError, RecursionError) as error:
        raise RunError(damaged(path, f"it is not JSON ({error})")) from error
    if not isinstance(found, dict):
        raise RunError(damaged(path, f"it holds a {type(found).__name__} instead of an object"))
    return found


def read_fields(kind: type[T], path: Path) -> T:
    """Read a dataclass from a JSON object that holds its fields, each of the type that it is declared with.

    Raises:
        RunError: The file cannot be read, or holds something else.
    """
    try:
        return TypeAdapter(kind).validate_python(read_json_object(path))
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()[:3])
        raise RunError(damaged(path, "; ".join(problems))) from error


def damaged(path: Path, why: str) -> str:
    """Return the message about a damaged file of a run."""
    return f"{path} is damaged: {why}; restore it from a backup, or repeat the run with --overwrite"


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable. Windows needs no such step, and opens no folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait for and hold an exclusive lock on the folder; the OS releases it when the process ends."""
    with (folder / ".lock").open("w") as file:
        lock(file)
        yield
