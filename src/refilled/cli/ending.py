"""The end of a command that cannot continue: a message and an exit code, for errors and signals.

Exit codes: 0 success; 1 partial success; 2 an error that the message explains; 128 + n ended by signal n.
"""

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType

from refilled.errors import RefilledError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")
_MEMORY_KNOBS = (
    "out of memory. To use less, keep decoded images on disk with --image-memory 0, choose a smaller --batch-size, "
    "--image-size or --student, or lower --jobs. An unfinished run is intact; continue it with 'refilled distill "
    "--resume FOLDER'"
)
_NO_SPACE = "no space left on device"
_MAKE_ROOM = (
    "Free some space. Then resume an unfinished run with 'refilled distill --resume FOLDER', or repeat any other "
    "command. REFILLED_CACHE and TMPDIR set the folders of files that can be computed again"
)
_REMEDIES = {
    errno.EACCES: "grant read and write permission, or choose another path",
    errno.EPERM: "grant read and write permission, or choose another path",
    errno.EROFS: "the file system is read-only; choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one, for example with --out",
    errno.ENOTDIR: "a part of the path is a file where a folder is needed; choose another path",
    errno.EEXIST: "a file exists where a folder is needed; choose another path, for example with --out",
    errno.EISDIR: "a folder exists where a file is needed; remove it, or choose another path",
    errno.ENOENT: "check the path",
    errno.EMFILE: "too many files are open; raise the limit with 'ulimit -n'",
}


class Terminated(BaseException):
    """SIGTERM arrived outside a loop that saves its state."""


def explain(error: BaseException) -> str | None:
    """Return the message of an error for the user; None for an error that is a defect of refilled.

    The message names the file and a remedy.
    """
    if isinstance(error, RefilledError):
        cause = error.__cause__
        if not (isinstance(cause, OSError) and cause.errno in _FULL):
            return str(error)
        return f"{error}; {_MAKE_ROOM}" if cause.filename is None else _disk_full(cause)
    if not isinstance(error, OSError) and _NO_SPACE in str(error).lower():  # from a native library
        return f"the disk is full ({error}). {_MAKE_ROOM}"
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)
    ):
        return _MEMORY_KNOBS
    if isinstance(error, UnicodeError):
        return f"a file or name is not in UTF-8 ({error}); convert or rename it"
    if isinstance(error, OSError):
        if error.errno in _FULL:
            return _disk_full(error)
        name = "" if error.filename is None else f"{error.filename}: "
        reason = (error.strerror or str(error) or type(error).__name__).lower()
        remedy = _REMEDIES.get(error.errno or 0)
        return f"{name}{reason}" + (f"; {remedy}" if remedy else "")
    return None


def _disk_full(error: OSError) -> str:
    place = Path(os.fsdecode(error.filename)) if error.filename else Path(tempfile.gettempdir())
    folder = next((p for p in (place, *place.parents) if p.is_dir()), Path.cwd())
    wanted = getattr(error, "wanted", None)
    needed = "" if wanted is None else f", {wanted:,} bytes are needed"
    try:
        room = f" and {shutil.disk_usage(folder).free:,} bytes are free there"
    except OSError:
        room = ""
    return f"the disk is full: {place} cannot be written{needed}{room}. {_MAKE_ROOM}"


@contextmanager
def ending_by_signal() -> Iterator[None]:
    """Raise :class:`Terminated` on SIGTERM, so that files are closed and partial files are removed.

    A second SIGTERM ends the process immediately. The training loop replaces the handler while it runs, because it
    saves its state.
    """

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def what_was_left(arguments: list[str]) -> str:
    """Return what a command that was ended by a signal has left on disk, and how to resume it."""
    folder = next(
        (Path(value) for name, value in pairwise(arguments) if name in ("--out", "--resume")),
        None,
    )
    if folder is not None and (folder / "run.toml").exists() and arguments[0] in ("train", "distill"):
        if (folder / "DONE").exists():
            return f"the run in {folder} is finished"
        saved = (folder / "last.ckpt").exists()
        left = "its last saved state is" if saved else "no step was saved; its configuration is"
        return f"{left} in {folder}. Resume with: refilled distill --resume {folder}"
    return "complete files are kept, partial files are removed. Repeat the command to continue"
