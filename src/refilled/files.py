"""Files that are whole or absent, whatever happens while they are written, and folders for one process at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Where things lie that can be made again: $REFILLED_CACHE, else ``~/.cache/refilled``."""
    return Path(os.environ.get("REFILLED_CACHE") or "~/.cache/refilled").expanduser()


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


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block with this folder; the system lets go when a process ends."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
