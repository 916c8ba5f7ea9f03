"""Data sets of the Hugging Face hub, through its library `datasets`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refilled.data.source import PART_NAMES, Picture, Rows, Source, stamp_of
from refilled.data.sources.parquet import as_picture, choose_column, number_labels
from refilled.errors import TaskError, unknown

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

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # no network, no such name, no access, a damaged file: each has its own class
        raise TaskError(
            f"hub:{name} could not be loaded ({error}); check the name and the network, or download its Parquet files "
            "and give their folder as the task"
        ) from error
    keys = {PART_NAMES[key.lower()]: key for key in loaded if key.lower() in PART_NAMES}
    tables = {part: loaded[key] for part, key in keys.items()}
    if "train" not in tables:
        raise TaskError(f"hub:{name} has no training part; it has {', '.join(loaded)}")
    features = tables["train"].features
    where = f"hub:{name}"
    if image is None:
        images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
        image = choose_column("image", images, list(features), where)
    if label is None:
        kinds = ("int", "uint", "string", "large_string")
        labels = [key for key, feature in features.items() if str(getattr(feature, "dtype", "")).startswith(kinds)]
        label = choose_column("label", labels, list(features), where)
    for column in (image, label):
        if column not in features:
            raise TaskError(f"{where}: {unknown('column', column, features)}")
    names = getattr(features[label], "names", None)
    raw = {part: list(table[label]) for part, table in tables.items()}
    classes, numbered = number_labels(raw, dict(enumerate(names)) if names else None, f"column '{label}' of {where}")
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


@dataclass(frozen=True)
class HubPart:
    """A part of a data set of the hub, as an Arrow table on disk."""

    labels: Rows
    table: Any
    image: str
    prefix: str

    def name(self, row: int) -> str:
        """Say where an image came from: ``uoft-cs/cifar100/train#17``."""
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
