"""Errors for users. Every message says what is wrong, where, and how to fix it.

::

    RefilledError
    ├── TaskError        the images, their labels, or the text that names a task
    ├── ModelError       an architecture, a weight file, a teacher
    ├── MethodError      a method, its parameters, or label spaces that it cannot work with
    ├── RunError         a run's configuration or folder
    │   ├── InUseError        another process holds the lock of the run
    │   ├── CheckpointError   a saved training state that cannot be used
    │   └── RankError         another process of a run under torchrun has ended
    └── NonFiniteError   a loss or gradient became NaN or infinite
"""

from collections.abc import Iterable
from difflib import get_close_matches


class RefilledError(Exception):
    """The base class of all errors that a user can fix."""


class TaskError(RefilledError):
    """The images, their labels, or the text that names a task."""


class ModelError(RefilledError):
    """An architecture, a weight file, or a teacher."""


class MethodError(RefilledError):
    """A method, its parameters, or label spaces that it cannot work with."""


class RunError(RefilledError):
    """A run's configuration or folder."""


class InUseError(RunError):
    """Another process holds the lock of the run."""


class CheckpointError(RunError):
    """A saved training state that cannot be used."""


class RankError(RunError):
    """Another process of a run under torchrun has ended."""


class NonFiniteError(RefilledError):
    """A loss or gradient became NaN or infinite."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return a message that ``name`` is not a known ``kind``, with the nearest known name and all known names.

    >>> unknown("method", "rdk", ["rkd", "vanilla"])
    "unknown method 'rdk'; did you mean 'rkd'? known: rkd, vanilla"
    """
    names = sorted(known)
    lower = {each.lower(): each for each in names}
    near = get_close_matches(name.lower(), lower, n=1)
    guess = f"; did you mean '{lower[near[0]]}'?" if near else ";"
    return f"unknown {kind} '{name}'{guess} known: {', '.join(names)}"
