"""Atomic writing of files, cells of tables, and exclusive locks on folders."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def spreadsheet_cell(text: str) -> str:
    """Keep a spreadsheet from running a text that begins like a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait for and hold an exclusive lock on the folder; the OS releases it when the process ends."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
