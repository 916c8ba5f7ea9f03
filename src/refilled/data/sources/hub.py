"""Data sets of the Hugging Face hub, read with the library `datasets`."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refilled.data.source import Picture, Rows, Source, part_in_name, stamp_of
from refilled.data.sources.columns import Cells, Column, choose_image, choose_label, read_labels, require
from refilled.data.sources.parquet import as_picture
from refilled.errors import TaskError

_BATCH = 256  # rows read at a time


def open_hub(name: str, image: str | None = None, label: str | None = None) -> Source:
    """Open a data set of the hub, or one in the cache of `datasets`. Code of the data set is never run.

    Args:
        name: The name on the hub, such as ``uoft-cs/cifar100``.
        image: The image column. None: the one whose feature is an image.
        label: The label column. None: found by name.

    Raises:
        TaskError: The data set cannot be loaded, or its columns cannot be used.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # no network, no such name, no access, a damaged file: each has its own class
        raise TaskError(
            f"hub:{name} could not be loaded ({error}); check the name and the network, or download its Parquet files "
            "and give their folder as the task"
        ) from error
    where = f"hub:{name}"
    keys = _part_keys(loaded, where)
    tables = {part: loaded[key] for part, key in keys.items()}
    features = tables["train"].features
    if image is None:
        images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
        image = choose_image(images, list(features), where)
    require(image, features, where)

    def cells_of(column: str) -> dict[str, list[Cells]]:
        cells = {}
        for part, table in tables.items():
            require(column, table.features, f"{where}, part '{keys[part]}'")
            names = getattr(table.features[column], "names", None)
            numbered = None if names is None else dict(enumerate(names))
            cells[part] = [Cells(f"{where}/{keys[part]}", list(table[column]), numbered)]
        return cells

    label = label or choose_label(_label_columns(features), list(features), where, cells_of)
    cells = cells_of(label)
    classes, labels = read_labels(cells, label)
    parts = {
        part: HubPart(
            labels[part], table.cast_column(image, datasets.Image(decode=False)), image, f"{name}/{keys[part]}"
        )
        for part, table in tables.items()
    }
    info = tables["train"].info
    return Source(
        classes,
        parts["train"],
        parts.get("val"),
        parts.get("test"),
        licence=info.license or None,
        citation=info.citation or None,
    )


def _part_keys(loaded: Iterable[str], where: str) -> dict[str, str]:
    """Return the key of each part. Keys of several words are ignored: they may be subsets of a part."""
    keys: dict[str, str] = {}
    for key in loaded:
        part, word = part_in_name(key)
        if part is None or word != key.lower():
            continue
        if part in keys:
            raise TaskError(
                f"{where} has two parts for {part}, '{keys[part]}' and '{key}'; download its Parquet files, keep those "
                "that you want, and give their folder as the task"
            )
        keys[part] = key
    if "train" not in keys:
        raise TaskError(f"{where} has no training part; it has {', '.join(loaded)}")
    return keys


def _label_columns(features: Mapping[str, Any]) -> list[Column]:
    kinds = ("int", "uint", "string", "large_string", "bool", "float", "double", "decimal")
    return [
        Column(key, type_of, None if names is None else tuple(names))
        for key, feature in features.items()
        if (type_of := str(getattr(feature, "dtype", ""))).startswith(kinds)
        for names in [getattr(feature, "names", None)]
    ]


@dataclass(frozen=True)
class HubPart:
    """A part of a data set of the hub, as an Arrow table on disk."""

    labels: Rows
    table: Any
    image: str
    prefix: str

    def name(self, row: int) -> str:
        """Return the name of an image, such as ``uoft-cs/cifar100/train#17``."""
        return f"{self.prefix}#{row}"

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Yield the encoded pictures of these rows, with a bounded number in memory."""
        column = self.table.select_columns(self.image)
        for start in range(0, len(rows), _BATCH):
            for value in column[rows[start : start + _BATCH]][self.image]:
                yield as_picture(value, Path())

    def stamp(self) -> str:
        """Return a digest of the fingerprint that `datasets` gives the table, and of the column's name."""
        return stamp_of((), self.table._fingerprint, self.image)
