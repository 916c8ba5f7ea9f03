"""Parse the text of a task: ``SOURCE[:SELECTION][@key=value,...]``."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from refilled.data.transforms import Augmentation
from refilled.errors import TaskError, unknown

NAMED = ("digits", "letters", "cifar100", "cub", "cifar_fs", "fc100")
"""Sources that are given by name."""

_PATHS = {"folder": "path", "wds": "wds"}
"""Prefixes of the path of a source, and the kind of source that each stands for."""
_OPTIONS = re.compile(r"\w+=[^,=@:/]*(,\w+=[^,=@:/]*)*")


@dataclass(frozen=True)
class TaskOptions:
    """The options in a task's text, after the at sign, under the same names."""

    seed: int = 0  # of halves, cuts and shots
    shots: int | None = None
    shots_seed: int = 0
    val: float = 0.1
    test: float | None = None  # fraction of all images of each class; replaces the source's own test part
    size: int | None = None
    augment: Augmentation | None = None
    image: str | None = None  # column of images
    label: str | None = None  # column of labels
    split: str | None = None  # class split: the name of one in the package, or a file next to the images
    bits: int | None = None  # bits per channel in use, in pictures with more than 8

    def __post_init__(self) -> None:
        if self.shots is not None and self.shots < 1:
            raise TaskError(
                f"shots={self.shots} leaves no images to train on; give 1 or more, or leave it out to use all images"
            )
        if not 0 <= self.val < 1:
            raise TaskError(f"val={self.val} is not a fraction to validate on; give at least 0 and less than 1")
        if self.test is not None and not 0 < self.test < 1:
            raise TaskError(f"test={self.test} is not a fraction to test on; give more than 0 and less than 1")
        if self.size is not None and not 1 <= self.size <= 4096:
            raise TaskError(f"an image size of {self.size} pixels is out of range; give 1 to 4096")
        if self.bits is not None and not 8 <= self.bits <= 16:
            raise TaskError(f"bits={self.bits} is out of range for the bits per channel; give 8 to 16")


@dataclass(frozen=True)
class TaskText:
    """A parsed task's text."""

    kind: str  # one of NAMED, "hub", "wds" or "path"
    source: str  # the name, the name on the hub, or the path
    selection: str | None  # of classes. None: all
    options: TaskOptions

    @property
    def columns(self) -> tuple[str | None, str | None]:
        """The image column and the label column in the text, or None."""
        return self.options.image, self.options.label

    def resolved(self, data_root: Path) -> str:
        """Return the text of the same task, with the options that differ from the defaults.

        A path is absolute, unless it is directly below the data root.
        """
        text, name = self.source, Path(self.source).name
        if self.kind in _PATHS.values() and Path(text) == data_root.absolute() / name and name not in NAMED:
            text = name
        if self.kind in ("hub", "wds"):
            text = f"{self.kind}:{text}"
        if self.selection is not None:
            text += f":{self.selection}"
        options = [f"{key}={value}" for key, value in asdict(self.options).items() if value != _DEFAULTS[key]]
        return f"{text}@{','.join(options)}" if options else text


def parse_task_text(text: str, data_root: Path, options: TaskOptions) -> TaskText:
    """Parse a task's text.

    A path may contain colons and at signs. The text is split so that the path is the longest one that exists.

    Args:
        text: The text, such as ``"cifar100:0-49@shots=50,seed=1"`` or ``"folder:/my photos:cat,dog"``.
        data_root: Folder in which names are looked up that are not a path from the working directory.
        options: Defaults for the options that the text does not set.

    Raises:
        TaskError: The form, the source or an option is unknown, or the text and ``options`` have different shots.
    """
    kind, source, selection, option_text = _split_text(text, data_root)
    chosen = _parse_options(option_text)
    if options.shots not in (None, chosen.get("shots", options.shots)):
        raise TaskError(
            f"'{text}' has shots={chosen['shots']}, but shots={options.shots} was requested too; leave out one"
        )
    return TaskText(kind, source, selection, replace(options, **chosen))


def absolute_task_text(text: str, data_root: Path) -> str:
    """Return a task's text in a form that is valid in any working directory. Its options stay as written.

    Raises:
        TaskError: The form or the source is unknown.
    """
    kind, source, selection, option_text = _split_text(text, data_root)
    body = TaskText(kind, source, selection, TaskOptions()).resolved(data_root)
    return f"{body}@{option_text}" if option_text else body


def _split_text(text: str, data_root: Path) -> tuple[str, str, str | None, str]:
    """Return kind, source and selection, as in :class:`TaskText`, and the text of the options."""
    text = text.strip()
    if not text:
        raise TaskError(
            "the text of a task is empty; give one such as 'digits', 'cifar100:0-49' or the path of a folder of images"
        )
    body, at, option_text = text.rpartition("@")
    prefix = text.partition(":")[0]
    path = text.removeprefix(f"{prefix}:") if prefix in _PATHS else text
    if not at or not _OPTIONS.fullmatch(option_text) or _find(path, data_root):
        body, option_text = text, ""
    kind, source, selection = _split_source(body, data_root)
    if selection is not None and not selection.strip():
        raise TaskError(f"'{text}' names no classes after the colon; write, for example, :0-49 or :random-half")
    return kind, source, selection.strip() if selection else None, option_text


def _split_source(body: str, data_root: Path) -> tuple[str, str, str | None]:
    head, colon, tail = body.partition(":")
    selection = tail if colon else None
    if head in NAMED:
        return head, head, selection
    if head == "hub":
        name, colon, selection_text = tail.partition(":")
        if not name.strip():
            raise TaskError(f"'{body}' names no data set of the hub; write, for example, hub:uoft-cs/cifar100")
        return "hub", name.strip(), selection_text if colon else None
    kind = _PATHS.get(head) if colon else None
    place = tail if kind else body
    for path, selection in _cuts(place):
        existing = _find(path, data_root)
        if existing:
            return kind or "path", str(existing.absolute()), selection
    if kind or "/" in place:
        raise TaskError(f"there is no folder or file '{place}', neither in the working directory nor in {data_root}")
    raise TaskError(
        f"{unknown('data set', head, [*NAMED, *_folders(data_root)])}; or give the path of a folder of images, of a "
        f".parquet file, wds:PATH of tar shards, or hub:NAME (data root: {data_root})"
    )


def _cuts(text: str) -> list[tuple[str, str | None]]:
    """Return all splits of a text into a path and a selection at one of its colons, the longest path first."""
    colons = [place for place, letter in enumerate(text) if letter == ":"]
    return [(text, None), *((text[:place], text[place + 1 :]) for place in reversed(colons))]


def expand_home(path: Path) -> Path:
    """Replace a leading ``~`` by the home directory, if there is one."""
    with suppress(RuntimeError, ValueError):  # no such user, or a NUL in the name
        return path.expanduser()
    return path


def _find(path: str, data_root: Path) -> Path | None:
    """Return the path that exists, relative to the working directory or else to the data root."""
    for candidate in (expand_home(Path(path)), data_root / path):
        with suppress(OSError, ValueError):  # a name that is too long or contains NUL
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
        raise TaskError(f"@{key}= has no value")
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
