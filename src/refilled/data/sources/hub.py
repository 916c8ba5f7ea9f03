"""Data sets of the Hugging Face hub, through its library `datasets`."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refilled.data.source import Picture, Rows, Source, part_in_name, stamp_of
from refilled.data.sources.columns import Cells, Column, choose_image, choose_label, read_labels, require
from refilled.data.sources.parquet import as_picture
from refilled.errors import TaskError
from refilled.network import hub

_BATCH = 256  # rows read at a time


def open_hub(name: str, image: str | None = None, label: str | None = None) -> Source:
    """Open a data set of the hub, or one that `datasets` has in its cache; its code is never run.

    Args:
        name: As on the hub: ``uoft-cs/cifar100``.
        image: The image column; the one that the features call an image if None.
        label: The label column; found by name if None.

    Raises:
        TaskError: It cannot be loaded, or its columns cannot be used.
    """
    import datasets

    offline = None
    try:
        with hub() as offline:
            loaded = datasets.load_dataset(name)
    except Exception as error:  # no network, no such name, no access, a damaged file: each has its own class
        raise TaskError(
            f"hub:{name} could not be loaded ({offline or error}); check the name and the network, or download its "
            "Parquet files and give their folder as the task"
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
        found = {}
        for part, table in tables.items():
            require(column, table.features, f"{where}, part '{keys[part]}'")
            names = getattr(table.features[column], "names", None)
            numbered = None if names is None else dict(enumerate(names))
            found[part] = [Cells(f"{where}/{keys[part]}", list(table[column]), numbered)]
        return found

    label = label or choose_label(_label_columns(features), list(features), where, cells_of)
    cells = cells_of(label)
    classes, numbered = read_labels(cells, label)
    parts = {
        part: HubPart(
            numbered[part], table.cast_column(image, datasets.Image(decode=False)), image, f"{name}/{keys[part]}"
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
    """Find what the parts are called; a name is taken where it is one word, since others may be subsets of a part."""
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
        """Return the origin of an image: ``uoft-cs/cifar100/train#17``."""
        return f"{self.prefix}#{row}"

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Read the encoded pictures of these rows, a bounded number at a time."""
        column = self.table.select_columns(self.image)
        for start in range(0, len(rows), _BATCH):
            for value in column[rows[start : start + _BATCH]][self.image]:
                yield as_picture(value, Path())

    def stamp(self) -> str:
        """Digest what `datasets` knows the table by, and the column's name."""
        return stamp_of((), self.table._fingerprint, self.image)
