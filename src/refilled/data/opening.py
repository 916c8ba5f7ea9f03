"""Open the source that a task's text names: one entry per kind of source in a table."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from refilled.data.source import Source
from refilled.data.sources import cifar100, cub, digits, letters
from refilled.data.sources.cifar100 import open_cifar100
from refilled.data.sources.csv_folder import is_csv_folder, is_list, open_csv_folder
from refilled.data.sources.cub import open_cub
from refilled.data.sources.digits import open_digits
from refilled.data.sources.hub import open_hub
from refilled.data.sources.image_folder import open_image_folder
from refilled.data.sources.letters import open_letters
from refilled.data.sources.parquet import is_parquet, open_parquet
from refilled.data.sources.webdataset import open_webdataset
from refilled.data.task_text import TaskText, expand_home
from refilled.errors import TaskError


class Opener(NamedTuple):
    """A kind of source: its form in a task's text, and the function that opens it."""

    form: str
    summary: str
    matches: Callable[[TaskText], bool]
    open: Callable[[TaskText, Path, bool], Source]
    """From the task's text, the data root, and whether labels are needed."""
    has_columns: bool = False
    """Whether ``@image=`` and ``@label=`` choose columns."""


def _kind(*kinds: str) -> Callable[[TaskText], bool]:
    """Return a test for texts of one of these kinds."""
    return lambda text: text.kind in kinds


def _path(*tests: Callable[[Path], bool]) -> Callable[[TaskText], bool]:
    """Return a test for paths that pass one of these tests."""
    return lambda text: text.kind == "path" and any(test(Path(text.source)) for test in tests)


_OPENERS = (
    Opener("digits", digits.SUMMARY, _kind("digits"), lambda text, root, labelled: open_digits()),
    Opener("letters", letters.SUMMARY, _kind("letters"), lambda text, root, labelled: open_letters()),
    Opener(
        "cifar100",
        cifar100.SUMMARY,
        _kind("cifar100"),
        lambda text, root, labelled: open_cifar100(root, *text.columns),
        has_columns=True,
    ),
    Opener("cub", cub.SUMMARY, _kind("cub"), lambda text, root, labelled: open_cub(root)),
    Opener(
        "cifar_fs, fc100",
        "CIFAR-100 with its classes split for few-shot learning, as in cifar_fs:seen",
        _kind("cifar_fs", "fc100"),
        lambda text, root, labelled: open_cifar100(root, *text.columns),
        has_columns=True,
    ),
    Opener(
        "FILE.parquet",
        "a table with a column of encoded images and a column of labels",
        _path(is_parquet),
        lambda text, root, labelled: open_parquet(Path(text.source), *text.columns, labelled=labelled),
        has_columns=True,
    ),
    Opener(
        "FILE.csv",
        "a list of images and labels; also a folder with labels.csv, or with train.csv and test.csv",
        _path(is_list, is_csv_folder),
        lambda text, root, labelled: open_csv_folder(Path(text.source), *text.columns),
        has_columns=True,
    ),
    Opener(
        "wds:PATH",
        "WebDataset shards: a tar file or a folder of tar files, with a .cls member next to each image",
        _kind("wds"),
        lambda text, root, labelled: open_webdataset(Path(text.source), *text.columns, labelled=labelled),
        has_columns=True,
    ),
    Opener(
        "hub:NAME",
        "a data set of the Hugging Face hub",
        _kind("hub"),
        lambda text, root, labelled: open_hub(text.source, *text.columns),
        has_columns=True,
    ),
    Opener(  # after the other paths: any folder matches
        "folder:PATH",
        "class folders of images, with or without train, val and test above them; PATH alone also works",
        _path(Path.is_dir),
        lambda text, root, labelled: open_image_folder(Path(text.source)),
    ),
)
"""The kinds of sources. The first one that matches a text opens it."""

_BY_NAME = ("NAME", "a folder of this name below the data root: class folders, or train.parquet and test.parquet")


def list_datasets() -> list[tuple[str, str]]:
    """Return the forms that a task's text can begin with, and a one-line summary of each."""
    return [*((opener.form, opener.summary) for opener in _OPENERS), _BY_NAME]


def data_folder(data_root: Path | None) -> Path:
    """Return the folder of data sets: ``data_root``, else ``REFILLED_DATA``, else ``~/.cache/refilled/data``."""
    return expand_home(data_root or Path(os.environ.get("REFILLED_DATA") or "~/.cache/refilled/data"))


def open_source(text: TaskText, data_root: Path, *, labelled: bool = True) -> Source:
    """Open the source that a task's text names.

    Args:
        text: The task's text.
        data_root: Folder of the data sets.
        labelled: Whether labels are needed. Without them, all images of a table or of shards belong to one class.

    Raises:
        TaskError: The source is missing or damaged, or the text names columns of a source that has none.
    """
    opener = next((opener for opener in _OPENERS if opener.matches(text)), None)
    if any(text.columns) and (opener is None or not opener.has_columns):
        raise TaskError(f"'{text.source}' is not a table and has no columns; leave out @image= and @label=")
    if opener is None:
        raise TaskError(f"{text.source} is not a folder, a .parquet file, or a .csv list of images and labels")
    return opener.open(text, data_root, labelled)
