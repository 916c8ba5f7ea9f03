"""Tables of encoded images: Parquet files as Hugging Face `datasets` writes them, or anything near."""

import json
import re
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from refilled.data.source import PART_NAMES, Picture, Rows, Source, stamp_of
from refilled.errors import TaskError, unknown

_COLUMN_NAMES = {
    "image": ("img", "image", "picture", "pixels"),
    "label": ("label", "labels", "fine_label", "class", "class_name", "target", "category"),
}
_BATCH = 128  # rows read at a time


def is_parquet(path: Path) -> bool:
    """Whether a path is a Parquet file or a folder of them."""
    return path.suffix == ".parquet" or bool(_part_files(path))


def open_parquet(path: Path, image: str | None = None, label: str | None = None, *, labelled: bool = True) -> Source:
    """Open one Parquet file, which is all training part, or a folder with a file or shards for each part.

    The part is the first word of a file's name: ``train.parquet``, ``validation-00000-of-00002.parquet``.

    The image column holds encoded bytes or Hugging Face's ``{bytes, path}``. Names of classes come from the label
    column itself if it holds text, else from the Hugging Face features in the schema, from a column ``class_name``,
    from ``classes.json`` beside the file, or are the label numbers.

    Args:
        path: The file or the folder.
        image: The image column; found by type and name if None.
        label: The label column; found by name if None.
        labelled: Whether a label column is needed; if not, none is read and all images are of one class.

    Raises:
        TaskError: A file is damaged, or its columns cannot be used.
    """
    files = _part_files(path) if path.is_dir() else {"train": [path]}
    if "train" not in files:
        raise TaskError(
            f"{path} has no training part; name one of its files train.parquet, or name a single file of it as the task"
        )
    tables = {part: _Table(tuple(paths)) for part, paths in files.items()}
    image = image or tables["train"].image_column()
    if not labelled:
        zeros = {part: np.zeros(table.length(), dtype=np.int64) for part, table in tables.items()}
        return _source(("",), zeros, image, tables)
    label = label or tables["train"].label_column(image)
    raw = {part: table.column(label) for part, table in tables.items()}
    classes, labels = number_labels(raw, _class_names(raw, tables, label), f"column '{label}' of {path}")
    return _source(classes, labels, image, tables)


def _source(classes: tuple[str, ...], labels: dict[str, Rows], image: str, tables: "dict[str, _Table]") -> Source:
    parts = {part: ParquetPart(labels[part], image, table.files, table.starts()) for part, table in tables.items()}
    return Source(classes, parts["train"], parts.get("val"), parts.get("test"))


@dataclass(frozen=True)
class _Table:
    """Rows that lie in one file or in several shards."""

    files: tuple[Path, ...]

    def schema(self) -> Any:
        import pyarrow.parquet as pq

        with _readable(self.files[0]):
            return pq.read_schema(self.files[0])

    def column(self, name: str) -> list[Any]:
        import pyarrow.parquet as pq

        values: list[Any] = []
        for file in self.files:
            with _readable(file):
                found = pq.ParquetFile(file)
                _require(name, found.schema_arrow.names, file)
                values += found.read(columns=[name]).column(0).to_pylist()
        return values

    def starts(self) -> tuple[int, ...]:
        import pyarrow.parquet as pq

        return tuple(accumulate((pq.read_metadata(file).num_rows for file in self.files[:-1]), initial=0))

    def length(self) -> int:
        import pyarrow.parquet as pq

        return sum(pq.read_metadata(file).num_rows for file in self.files)

    def image_column(self) -> str:
        import pyarrow.types as types

        schema = self.schema()
        fields = [field for field in schema if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0]
        fields = fields or [
            field for field in schema if types.is_binary(field.type) or types.is_large_binary(field.type)
        ]
        return choose_column("image", [field.name for field in fields], schema.names, str(self.files[0]))

    def label_column(self, image: str) -> str:
        import pyarrow.types as types

        schema = self.schema()
        fields = [
            field.name
            for field in schema
            if field.name != image and (types.is_integer(field.type) or _is_text(field.type))
        ]
        return choose_column("label", fields, schema.names, str(self.files[0]))


@dataclass(frozen=True)
class ParquetPart:
    """A part of a data set that lies in Parquet files."""

    labels: Rows
    image: str
    files: tuple[Path, ...]
    starts: tuple[int, ...]
    """The row at which each file begins."""

    def name(self, row: int) -> str:
        """Say where an image came from: ``train.parquet#17``."""
        shard = bisect(self.starts, row) - 1
        return f"{self.files[shard].name}#{row - self.starts[shard]}"

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Read the encoded pictures of these rows, a bounded number at a time."""
        import pyarrow.parquet as pq

        ends = (*self.starts[1:], len(self.labels))
        for file, start, end in zip(self.files, self.starts, ends, strict=True):
            if not np.any((rows >= start) & (rows < end)):
                continue
            with _readable(file):
                found = pq.ParquetFile(file)
                _require(self.image, found.schema_arrow.names, file)
                for group in range(found.num_row_groups):
                    length = found.metadata.row_group(group).num_rows
                    if np.any((rows >= start) & (rows < start + length)):
                        yield from self._pictures_of_group(found, group, rows - start, file.parent)
                    start += length

    def stamp(self) -> str:
        """Digest the states of the files, and the column's name."""
        return stamp_of(self.files, self.image)

    def _pictures_of_group(self, file: Any, group: int, rows: Rows, folder: Path) -> Iterator[Picture]:
        start = 0
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[self.image]):
            wanted = rows[(rows >= start) & (rows < start + len(batch))] - start
            for value in batch.column(0).take(wanted).to_pylist():
                yield as_picture(value, folder)
            start += len(batch)


def as_picture(value: Any, folder: Path) -> Picture:
    """Take the picture out of a table's cell: bytes, or Hugging Face's ``{bytes, path}``."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return folder / str(value["path"])
        value = value.get("bytes")
    return value if isinstance(value, bytes) else b""  # an empty cell is listed as an empty picture


def _part_files(folder: Path) -> dict[str, list[Path]]:
    """Find the files of each part, in a folder or in its subfolder ``data``; a lone file is the training part."""
    for place in (folder, folder / "data"):
        files = sorted(place.glob("*.parquet"))
        parts: dict[str, list[Path]] = {}
        for file in files:
            part = PART_NAMES.get(re.split(r"[-_.]", file.name.lower())[0])
            if part:
                parts.setdefault(part, []).append(file)
        if parts:
            return parts
        if len(files) == 1:
            return {"train": files}
        if files:
            return {"": files}  # there is something, but nothing to train on
    return {}


def choose_column(what: str, candidates: Sequence[str], columns: Sequence[str], where: str) -> str:
    """Choose the ``"image"`` or ``"label"`` column among those of a fitting type, by their usual names."""
    if len(candidates) == 1:
        return candidates[0]
    for name in _COLUMN_NAMES[what]:
        if name in candidates:
            return name
    raise TaskError(
        f"cannot tell which column of {where} is the {what}: it has {', '.join(columns)}; add @{what}=COLUMN to the "
        "task"
    )


def number_labels(
    raw: dict[str, list[Any]], names: dict[Any, str] | None, where: str
) -> tuple[tuple[str, ...], dict[str, Rows]]:
    """Turn the labels of all parts into positions in one tuple of class names.

    Labels that are text are their own names and come in alphabetical order; integers come in their order.

    Args:
        raw: The labels of each part.
        names: The name of each integer label, where known.
        where: What to call the column in errors.

    Raises:
        TaskError: Labels are missing, mixed, of another type, or without a name.
    """
    kinds = {type(value) for part in raw.values() for value in part}
    if kinds not in ({int}, {str}):
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        raise TaskError(f"labels must be all integers or all text, but {where} holds {found}")
    values = {value for part in raw.values() for value in part}
    if kinds == {str}:
        names = {value: value for value in values}
    names = names or {value: str(value) for value in values}
    for value in values - names.keys():
        raise TaskError(f"{where} holds label {value!r}, but there are names for {min(names)} to {max(names)} only")
    position = {value: place for place, value in enumerate(sorted(names))}
    labels = {part: np.array([position[value] for value in found], dtype=np.int64) for part, found in raw.items()}
    return tuple(names[value] for value in position), labels


def _class_names(raw: dict[str, list[Any]], tables: dict[str, _Table], label: str) -> dict[Any, str] | None:
    """Find the names of the classes by their numbers, or None."""
    schema, beside = tables["train"].schema(), tables["train"].files[0].with_name("classes.json")
    with suppress(KeyError, TypeError, ValueError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return dict(enumerate(map(str, features[label]["names"])))
    if "class_name" in schema.names:
        pairs = {
            pair
            for part, table in tables.items()
            for pair in zip(raw[part], map(str, table.column("class_name")), strict=True)
        }
        # Another label column, say a coarser one, has no single class name for a number.
        if len(pairs) == len(dict(pairs)):
            return dict(pairs)
    with suppress(OSError, KeyError, TypeError, ValueError):
        listed = json.loads(beside.read_text(encoding="utf-8"))
        listed = listed["classes"] if isinstance(listed, dict) else listed
        if isinstance(listed, list):
            return dict(enumerate(map(str, listed)))
    return None


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or (types.is_dictionary(kind) and _is_text(kind.value_type))
    )


def _require(name: str, names: Sequence[str], file: Path) -> None:
    if name not in names:
        raise TaskError(f"{file}: {unknown('column', name, names)}")


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Say of a damaged file what it is."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, ValueError) as error:
        raise TaskError(f"{file} cannot be read as Parquet ({error}); write or download it again") from error
