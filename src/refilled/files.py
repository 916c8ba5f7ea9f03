"""Files that are whole or absent, whatever happens while they are written."""

import os
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a machine that loses power, finds the old bytes or the new, never a mixture.

    Raises:
        OSError: the disk is full or not writable; the old file is then untouched.
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


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
