"""Tables of encoded images: Parquet files as Hugging Face `datasets` writes them, and similar ones."""

import json
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from refilled.data.source import Part, Picture, Rows, SelectedPart, Source, by_part, part_in_name, stamp_of
from refilled.data.sources.columns import (
    Cells,
    Column,
    choose_image,
    choose_label,
    choose_part,
    read_labels,
    require,
    rows_of_parts,
)
from refilled.errors import TaskError

_BATCH = 128  # rows read at a time
_SUFFIX = ".parquet"
_NAME_COLUMNS = ("class_name", "label_name", "category_name")  # columns with the class name of an integer label


def is_parquet(path: Path) -> bool:
    """Return whether a path is a Parquet file or a folder of them."""
    return path.suffix.lower() == _SUFFIX or bool(_tables_in(path))


def open_parquet(path: Path, image: str | None = None, label: str | None = None, *, labelled: bool = True) -> Source:
    """Open one Parquet file, or a folder with a file or shards for each part.

    The part is in the name of the file, as in ``train.parquet`` and ``validation-00000-of-00002.parquet``, or is the
    name of its folder, as in ``train/0000.parquet``. The files are in the folder itself, in its subfolder ``data``, or
    in a subfolder named after a configuration of the data set, as on the Hugging Face hub. A single file is the
    training part, unless a column such as ``split`` gives the part of each row.

    The image column holds encoded bytes or Hugging Face's ``{bytes, path}``. Text labels are their own class names. The
    class names of integer labels are taken from the first of these that exists: the Hugging Face features in the
    schema, a column such as ``class_name``, ``classes.json`` next to the file, the numbers themselves. Every file must
    have both columns.

    Args:
        path: The file or the folder.
        image: The image column. None: found by type and name.
        label: The label column. None: found by name.
        labelled: Whether labels are needed. If not, no label column is read and all images belong to one class.

    Raises:
        TaskError: A file is damaged, its columns cannot be used, or the files contradict each other.
    """
    files = _part_files(path) if path.is_dir() else {"train": [path]}
    if "train" not in files:
        raise TaskError(
            f"{path} has no training part; name one of its files train.parquet, or give a single file as the task"
        )
    tables = {part: tuple(map(_File, paths)) for part, paths in files.items()}
    every = [file for part in tables.values() for file in part]
    where, columns = str(every[0].path), list(dict.fromkeys(name for file in every for name in file.columns))
    image = image or choose_image(_first(file.image_columns() for file in every), columns, where)

    def cells_of(column: str) -> dict[str, list[Cells]]:
        return _label_cells(tables, column)

    for file in every:
        require(image, file.columns, str(file.path))
        file.check_image(image)
    if not labelled:
        parts = {
            part: _part(np.zeros(sum(file.rows for file in shards), dtype=np.int64), image, shards)
            for part, shards in tables.items()
        }
        return Source(("",), parts["train"], parts.get("val"), parts.get("test"))
    label = label or choose_label(_label_columns(every, image), columns, where, cells_of)
    listed = _listed_classes(every[0].path.with_name("classes.json"))
    cells = cells_of(label)
    if listed is not None and not any(c.names for shards in cells.values() for c in shards):
        cells = {part: [Cells(c.where, c.values, listed) for c in shards] for part, shards in cells.items()}
    classes, labels = read_labels(cells, label)
    parts = {part: _part(labels[part], image, shards) for part, shards in tables.items()}
    if len(parts) > 1:
        return Source(classes, parts["train"], parts.get("val"), parts.get("test"))
    divided, notes = _divide(parts["train"], tables["train"])
    return Source(classes, divided["train"], divided.get("val"), divided.get("test"), notes=notes)


def _part(labels: Rows, image: str, files: Sequence["_File"]) -> "ParquetPart":
    starts = tuple(accumulate((file.rows for file in files[:-1]), initial=0))
    return ParquetPart(labels, image, tuple(file.path for file in files), starts)


def _divide(whole: "ParquetPart", files: Sequence["_File"]) -> tuple[Mapping[str, Part], tuple[str, ...]]:
    """Divide a table by its column of parts, if it has one; return the parts and notes."""
    column = choose_part(files[0].text_columns())
    if column is None or not all(column in file.text_columns() for file in files):
        return {"train": whole}, ()
    rows, notes = rows_of_parts([value for file in files for value in file.read(column)], column, str(files[0].path))
    return {part: SelectedPart(whole, chosen) for part, chosen in rows.items()}, notes


def _label_cells(tables: Mapping[str, Sequence["_File"]], column: str) -> dict[str, list[Cells]]:
    """Read a label column of every file, with the class names of its integers if the files give any."""
    cells = {part: [file.labels(column) for file in files] for part, files in tables.items()}
    if any(c.names for shards in cells.values() for c in shards):
        return cells
    for name_column in _NAME_COLUMNS:
        pairs = {
            part: [file.pairs(c.values, name_column) for file, c in zip(files, cells[part], strict=True)]
            for part, files in tables.items()
        }
        by_file = [file_pairs for shards in pairs.values() for file_pairs in shards]
        # The names may belong to another label column, such as a finer one: then a number has several names.
        if name_column == column or not any(by_file) or any(len(p) > len(dict(p)) for p in by_file):
            continue
        return {
            part: [Cells(c.where, c.values, dict(p)) for c, p in zip(cells[part], pairs[part], strict=True)]
            for part in cells
        }
    return cells


class _File:
    """One Parquet file. Its schema is read at once, its columns on demand."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        with _readable(path):
            metadata = pq.read_metadata(path)
            self.rows: int = metadata.num_rows
            self.schema = metadata.schema.to_arrow_schema()
        self.columns: list[str] = self.schema.names

    def image_columns(self) -> list[str]:
        """Return the columns whose type can hold images: structs of bytes if there are any, else bytes."""
        structs = [field.name for field in self.schema if _is_image_struct(field.type)]
        return structs or [field.name for field in self.schema if _is_bytes(field.type)]

    def label_columns(self) -> list[Column]:
        return [
            Column(field.name, str(field.type), self._class_label(field.name))
            for field in self.schema
            if _can_be_label(field.type)
        ]

    def check_image(self, column: str) -> None:
        kind = self.schema.field(column).type
        if not (_is_image_struct(kind) or _is_bytes(kind)):
            raise TaskError(
                f"column '{column}' of {self.path} holds {kind}, not images; an image is encoded bytes, or a struct of "
                "bytes and path. Name another column with @image=COLUMN"
            )

    def text_columns(self) -> list[str]:
        return [field.name for field in self.schema if _is_text(field.type)]

    def labels(self, column: str) -> Cells:
        require(column, self.columns, str(self.path))
        names = self._class_label(column)
        return Cells(str(self.path), self.read(column), None if names is None else dict(enumerate(names)))

    def pairs(self, labels: Sequence[Any], name_column: str) -> set[tuple[Any, str]]:
        """Return the distinct pairs of a label and the name in the same row of a column of names."""
        if name_column not in self.columns:
            return set()
        return set(zip(labels, map(str, self.read(name_column)), strict=True))

    def read(self, column: str) -> list[Any]:
        import pyarrow.parquet as pq

        with _readable(self.path):
            values: list[Any] = pq.ParquetFile(self.path).read(columns=[column]).column(column).to_pylist()
            return values

    def _class_label(self, column: str) -> tuple[str, ...] | None:
        """Return the class names of a column in Hugging Face's features, or None."""
        with suppress(KeyError, TypeError, ValueError):
            features = json.loads((self.schema.metadata or {})[b"huggingface"])["info"]["features"]
            return tuple(map(str, features[column]["names"]))
        return None


@dataclass(frozen=True)
class ParquetPart:
    """A part that is stored in Parquet files."""

    labels: Rows
    image: str
    files: tuple[Path, ...]
    starts: tuple[int, ...]
    """The first row of each file."""

    def name(self, row: int) -> str:
        """Return the name of an image, such as ``train.parquet#17``."""
        shard = bisect(self.starts, row) - 1
        return f"{self.files[shard].name}#{row - self.starts[shard]}"

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Yield the encoded pictures of these rows, with a bounded number in memory."""
        import pyarrow.parquet as pq

        ends = (*self.starts[1:], len(self.labels))
        for file, start, end in zip(self.files, self.starts, ends, strict=True):
            if not np.any((rows >= start) & (rows < end)):
                continue
            with _readable(file):
                table = pq.ParquetFile(file)
                for group in range(table.num_row_groups):
                    length = table.metadata.row_group(group).num_rows
                    if np.any((rows >= start) & (rows < start + length)):
                        yield from self._pictures_of_group(table, group, rows - start, file.parent)
                    start += length

    def stamp(self) -> str:
        """Return a digest of the states of the files and of the column's name."""
        return stamp_of(self.files, self.image)

    def _pictures_of_group(self, table: Any, group: int, rows: Rows, folder: Path) -> Iterator[Picture]:
        start = 0
        for batch in table.iter_batches(_BATCH, row_groups=[group], columns=[self.image]):
            wanted = rows[(rows >= start) & (rows < start + len(batch))] - start
            for value in batch.column(0).take(wanted).to_pylist():
                yield as_picture(value, folder)
            start += len(batch)


def as_picture(value: Any, folder: Path) -> Picture:
    """Return the picture in a cell of a table: bytes, or Hugging Face's ``{bytes, path}``."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return folder / str(value["path"])
        value = value.get("bytes")
    return value if isinstance(value, bytes) else b""  # an empty cell is reported as an empty picture


def _part_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each part. A single file of no part is the training part."""
    tables = _tables_in(folder)
    parts = by_part(tables, folder)
    return {"train": [tables[0][0]]} if len(tables) == 1 and not parts else parts


def _tables_in(folder: Path) -> list[tuple[Path, str]]:
    """Return the Parquet files of a folder, or of the subfolders in which published data sets store them.

    Each comes with the name that contains its part: its own, or that of its folder.
    """
    if not folder.is_dir():
        return []
    for place in (folder, folder / "data"):
        if tables := _of_place(place):
            return tables
    configurations = {place: _of_place(place) for place in _folders(folder)}
    if not all(configurations.values()):  # a folder of other data, with a table somewhere in it
        return []
    if len(configurations) > 1:
        names = ", ".join(place.name for place in configurations)
        raise TaskError(
            f"{folder} holds several configurations of a data set ({names}); give one as the task, such as "
            f"{next(iter(configurations))}"
        )
    return next(iter(configurations.values()), [])


def _of_place(place: Path) -> list[tuple[Path, str]]:
    """Return the Parquet files of a folder, or of its subfolders that are named after parts and have no subfolders."""
    if files := _parquet_files(place):
        return [(file, file.name) for file in files]
    folders = [folder for folder in _folders(place) if part_in_name(folder.name)[0] and not _folders(folder)]
    return [(file, folder.name) for folder in folders for file in _parquet_files(folder)]


def _parquet_files(folder: Path) -> list[Path]:
    with suppress(OSError):
        files = (file for file in folder.iterdir() if file.suffix.lower() == _SUFFIX and not file.name.startswith("."))
        # On the hub, metadata.parquet describes a folder of images and contains none itself.
        return sorted(file for file in files if file.name != "metadata.parquet")
    return []


def _folders(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return []


def _label_columns(files: Sequence[_File], image: str) -> list[Column]:
    """Merge the columns of all files that can hold labels. A ``ClassLabel`` in any file takes precedence."""
    merged: dict[str, Column] = {}
    for column in (column for file in files for column in file.label_columns() if column.name != image):
        if column.name not in merged or merged[column.name].names is None:
            merged[column.name] = column
    return list(merged.values())


def _first(candidates: Iterator[list[str]]) -> list[str]:
    """Return the first list that is not empty."""
    return next((names for names in candidates if names), [])


def _listed_classes(file: Path) -> Mapping[int, str] | None:
    """Return the class names in a JSON file, a list or ``{"classes": [...]}``; None if it cannot be read."""
    with suppress(OSError, KeyError, TypeError, ValueError, RecursionError):
        content = json.loads(file.read_text(encoding="utf-8"))
        names = content["classes"] if isinstance(content, dict) else content
        if isinstance(names, list):
            return dict(enumerate(map(str, names)))
    return None


def _is_image_struct(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _can_be_label(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _can_be_label(kind.value_type)
    number = types.is_integer(kind) or types.is_boolean(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return bool(number or _is_text(kind))


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn errors of Parquet into a :class:`TaskError` that names the file."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, ValueError) as error:
        raise TaskError(f"{file} cannot be read as Parquet ({error}); write or download it again") from error
