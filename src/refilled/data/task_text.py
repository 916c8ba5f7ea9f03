"""The short text form of a task: ``SOURCE[:SELECTION][@key=value,...]``."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from refilled.data.transforms import Augmentation
from refilled.errors import TaskError, unknown

NAMED = ("digits", "letters", "cifar100", "cub", "cifar_fs", "fc100")
"""Sources that are known by name alone."""

_PATHS = {"folder": "path", "wds": "wds"}
"""What may stand before the path of a source, and the kind that it makes of it."""
_OPTIONS = re.compile(r"\w+=[^,=@:/]*(,\w+=[^,=@:/]*)*")


@dataclass(frozen=True)
class TaskOptions:
    """What a task's text may say after the at sign, by the same names."""

    seed: int = 0  # of halves, cuts and shots
    shots: int | None = None
    shots_seed: int = 0
    val: float = 0.1
    test: float | None = None  # of all images of a class, instead of the source's own test part
    size: int | None = None
    augment: Augmentation | None = None
    image: str | None = None  # columns of a table
    label: str | None = None
    split: str | None = None  # of the classes: one of the package's, or a file beside the images
    bits: int | None = None  # of the levels in pictures with more than 8 bits a channel

    def __post_init__(self) -> None:
        if self.shots is not None and self.shots < 1:
            raise TaskError(
                f"shots={self.shots} leaves nothing to train on; give 1 or more, or leave it out for all images"
            )
        if not 0 <= self.val < 1:
            raise TaskError(
                f"val={self.val} is no fraction to hold out for validation; give 0 or more, and less than 1"
            )
        if self.test is not None and not 0 < self.test < 1:
            raise TaskError(f"test={self.test} is no fraction to test on; give more than 0 and less than 1")
        if self.size is not None and not 1 <= self.size <= 4096:
            raise TaskError(f"an image size of {self.size} pixels is out of bounds; give 1 to 4096")
        if self.bits is not None and not 8 <= self.bits <= 16:
            raise TaskError(f"bits={self.bits} is no number of bits a channel; give 8 to 16")


@dataclass(frozen=True)
class TaskText:
    """A task's text, taken apart."""

    kind: str  # one of NAMED, "hub", "wds" or "path"
    source: str  # the same name, the hub's name, or the path
    selection: str | None  # which classes; None for all
    options: TaskOptions

    @property
    def columns(self) -> tuple[str | None, str | None]:
        """The image column and the label column of a table, where the text names them."""
        return self.options.image, self.options.label

    def resolved(self, data_root: Path) -> str:
        """Write the text that gives the same task, with the options that are not the defaults.

        A path is absolute, unless it lies directly below the data root.
        """
        text, name = self.source, Path(self.source).name
        if self.kind in _PATHS.values() and Path(text) == data_root.absolute() / name and name not in NAMED:
            text = name
        if self.kind in ("hub", "wds"):
            text = f"{self.kind}:{text}"
        if self.selection is not None:
            text += f":{self.selection}"
        said = [f"{key}={value}" for key, value in asdict(self.options).items() if value != _DEFAULTS[key]]
        return f"{text}@{','.join(said)}" if said else text


def parse_task_text(text: str, data_root: Path, options: TaskOptions) -> TaskText:
    """Take a task's text apart.

    A path may hold colons and at signs: of the ways to cut the text, the one with the longest path that exists counts.

    Args:
        text: Such as ``"cifar100:0-49@shots=50,seed=1"`` or ``"folder:/my photos:cat,dog"``.
        data_root: Where a name that is no path from here is looked for.
        options: What holds where the text says nothing.

    Raises:
        TaskError: The form, the source or an option is unknown, or the shots asked for are not those of the text.
    """
    kind, source, selection, said = _take_apart(text, data_root)
    chosen = _parse_options(said)
    if options.shots not in (None, chosen.get("shots", options.shots)):
        raise TaskError(
            f"'{text}' says shots={chosen['shots']}, but shots={options.shots} was asked for; leave out one"
        )
    return TaskText(kind, source, selection, replace(options, **chosen))


def absolute_task_text(text: str, data_root: Path) -> str:
    """Write a task's text so that it means the same in any working directory; its options stay as they are written.

    Raises:
        TaskError: The form or the source is unknown.
    """
    kind, source, selection, said = _take_apart(text, data_root)
    body = TaskText(kind, source, selection, TaskOptions()).resolved(data_root)
    return f"{body}@{said}" if said else body


def _take_apart(text: str, data_root: Path) -> tuple[str, str, str | None, str]:
    """Return kind, source and selection, as in :class:`TaskText`, and the text of the options."""
    text = text.strip()
    if not text:
        raise TaskError("a task needs a text such as 'digits', 'cifar100:0-49' or the path of a folder of images")
    body, at, said = text.rpartition("@")
    prefix = text.partition(":")[0]
    path = text.removeprefix(f"{prefix}:") if prefix in _PATHS else text
    if not at or not _OPTIONS.fullmatch(said) or _find(path, data_root):
        body, said = text, ""
    kind, source, selection = _split_source(body, data_root)
    if selection is not None and not selection.strip():
        raise TaskError(f"'{text}' names no classes after the colon; write for example :0-49 or :random-half")
    return kind, source, selection.strip() if selection else None, said


def _split_source(body: str, data_root: Path) -> tuple[str, str, str | None]:
    head, colon, tail = body.partition(":")
    selection = tail if colon else None
    if head in NAMED:
        return head, head, selection
    if head == "hub":
        name, colon, selection_text = tail.partition(":")
        if not name.strip():
            raise TaskError(f"'{body}' names no data set of the hub; write for example hub:uoft-cs/cifar100")
        return "hub", name.strip(), selection_text if colon else None
    kind = _PATHS.get(head) if colon else None
    place = tail if kind else body
    for path, selection in _cuts(place):
        found = _find(path, data_root)
        if found:
            return kind or "path", str(found.absolute()), selection
    if kind or "/" in place:
        raise TaskError(f"there is no folder or file '{place}', neither here nor in {data_root}")
    raise TaskError(
        f"{unknown('data set', head, [*NAMED, *_folders(data_root)])}; or give the path of a folder of images, of a "
        f".parquet file, wds:PATH of tar shards, or hub:NAME (data root: {data_root})"
    )


def _cuts(text: str) -> list[tuple[str, str | None]]:
    """All ways to cut a text into a path and a selection at one of its colons, the longest path first."""
    colons = [place for place, letter in enumerate(text) if letter == ":"]
    return [(text, None), *((text[:place], text[place + 1 :]) for place in reversed(colons))]


def expand_home(path: Path) -> Path:
    """Put the home directory for a leading ``~``, where there is one."""
    with suppress(RuntimeError, ValueError):  # no such user; a NUL in the name
        return path.expanduser()
    return path


def _find(path: str, data_root: Path) -> Path | None:
    """Find what exists by this name, from here or else from the data root."""
    for candidate in (expand_home(Path(path)), data_root / path):
        with suppress(OSError, ValueError):  # too long a name; a NUL in it
            if path and candidate.exists():
                return candidate
    return None


def _folders(root: Path) -> list[str]:
    try:
        return [entry.name for entry in root.iterdir() if entry.is_dir()]
    except OSError:
        return []


def _parse_options(text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in text.split(",") if text else []:
        key, _, value = pair.partition("=")
        if key not in _READERS:
            raise TaskError(unknown("option", key, _READERS))
        options[key] = _READERS[key](key, value)
    return options


def _whole(key: str, value: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", value):
        raise TaskError(f"@{key}={value} must be a whole number")
    return int(value)


def _fraction(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise TaskError(f"@{key}={value} must be a number") from None


def _name(key: str, value: str) -> str:
    if not value:
        raise TaskError(f"@{key}= names nothing")
    return value


def _augmentation(key: str, value: str) -> str:
    if value not in get_args(Augmentation):
        raise TaskError(unknown("augmentation", value, get_args(Augmentation)))
    return value


_READERS: dict[str, Callable[[str, str], Any]] = {
    "shots": _whole,
    "seed": _whole,
    "shots_seed": _whole,
    "val": _fraction,
    "test": _fraction,
    "size": _whole,
    "augment": _augmentation,
    "image": _name,
    "label": _name,
    "split": _name,
    "bits": _whole,
}

_DEFAULTS = asdict(TaskOptions())
