"""Atomic writing of files, cells of tables, and exclusive locks on folders."""

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from refilled.errors import RunError
from refilled.locks import lock

if TYPE_CHECKING:
    from torch import Tensor

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


def append(path: Path, text: str) -> None:
    """Add text to the end of a file.

    Raises:
        OSError: The disk is full or not writable; it names the file.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        error.filename = str(path)
        raise


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


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of a run that holds one JSON object per line.

    Raises:
        RunError: It cannot be read, or a line is something else.
    """
    entries = []
    for number, line in enumerate(read_record(path).splitlines(), 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RunError(damaged(path, f"line {number} is not JSON ({error})")) from error
        if not isinstance(entry, dict):
            raise RunError(damaged(path, f"line {number} is no JSON object"))
        entries.append(entry)
    return entries


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file that belongs to a run.

    Raises:
        RunError: It cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(read_record(path))
    except (ValueError, RecursionError) as error:
        raise RunError(damaged(path, f"it is not TOML ({error})")) from error


def read_tensors(path: Path) -> dict[str, "Tensor"]:
    """Read a safetensors file that belongs to a run.

    Raises:
        RunError: It cannot be read, or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except OSError as error:
        raise RunError(damaged(path, (error.strerror or str(error)).lower())) from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise RunError(damaged(path, f"it holds no tensors ({error})")) from error


def require(path: Path, found: Mapping[str, Any], **kinds: type | tuple[type, ...]) -> None:
    """Check that a record has these keys with values of these types.

    Raises:
        RunError: A key is missing, or its value is of another type.
    """
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise RunError(damaged(path, f"'{name}' is missing, or of another type"))


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
