"""Locks on open files that the system releases when a process ends, however it ends: on Linux, macOS and Windows."""

import os
import time
from types import ModuleType
from typing import IO

posix: ModuleType | None
try:
    import fcntl as posix
except ImportError:  # Windows
    posix = None
    import msvcrt

_FAR = 2**30  # Windows lets nobody read a locked byte, so the locked ones lie beyond the text of a file
_WAIT_S = 0.05


def lock(file: IO[str], byte: int | None = None, *, wait: bool = True) -> bool:
    """Lock an open file for this process, or one byte of it, which stands for a part of the work.

    Args:
        file: A file that is open for writing. Closing it releases the lock.
        byte: Number of the byte; None: the whole file.
        wait: Wait until no other process holds the lock.

    Returns:
        Whether this process holds it now; always True if ``wait``.
    """
    if posix is None:
        return _lock_on_windows(file, byte, wait)
    flags = posix.LOCK_EX | (0 if wait else posix.LOCK_NB)
    try:
        if byte is None:
            posix.flock(file, flags)
        else:
            posix.lockf(file, flags, 1, byte)
    except (BlockingIOError, PermissionError):
        if wait:
            raise
        return False
    return True


def unlock(file: IO[str], byte: int) -> None:
    """Release the lock on a byte of a file."""
    if posix is None:
        os.lseek(file.fileno(), _FAR + byte, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]
    else:
        posix.lockf(file, posix.LOCK_UN, 1, byte)


def _lock_on_windows(file: IO[str], byte: int | None, wait: bool) -> bool:
    position = os.lseek(file.fileno(), 0, os.SEEK_CUR)
    try:
        while True:
            os.lseek(file.fileno(), _FAR + (0 if byte is None else byte), os.SEEK_SET)
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            except OSError:
                if not wait:
                    return False
                time.sleep(_WAIT_S)
            else:
                return True
    finally:
        os.lseek(file.fileno(), position, os.SEEK_SET)
