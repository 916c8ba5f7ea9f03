"""Embeddings of image files, by a run's student or by any teacher, written to a table as they are computed.

Memory holds three batches of images, whatever their number.
"""

import csv
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from refilled.data import GreyRange
from refilled.data.streaming import decode_ahead
from refilled.data.walking import as_text
from refilled.errors import ModelError, RunError, TaskError
from refilled.files import spreadsheet_cell, sync_folder
from refilled.models import Backbone, load_teacher, refuse_non_finite
from refilled.models.backbone import Pooling
from refilled.runs.classifying import named_images
from refilled.runs.environment import find_device
from refilled.runs.folder import RunFolder
from refilled.runs.inference import network_of
from refilled.training.evaluation import predict

FORMATS = (".parquet", ".csv", ".npz")
_BATCH = 256


@dataclass(frozen=True)
class Rows:
    """The readable images of a batch."""

    images: list[Path]
    embedding: Tensor
    """float32 ``(N, d)``, on the CPU."""
    classes: list[str] | None
    """The class with the highest probability; None if the model has no named classes."""
    probabilities: Tensor | None
    """Its probability ``(N,)``."""
    unreadable: list[tuple[Path, str]]
    """Images that could not be read, and why."""


def open_network(
    text: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    image_size: int | None = None,
    pooling: Pooling | None = None,
) -> Backbone:
    """Load the network that embeds images: the student in a run's folder, or a teacher.

    Args:
        text: The folder of a run, or a teacher; see :func:`~refilled.models.load_teacher`, also for the other
            arguments. A run that trained nothing has its teacher's embedding.
        mean: Mean of each channel that a teacher expects.
        std: Standard deviation of each channel.
        input_size: Side length in pixels that a teacher's input is resized to.
        image_size: Side length that images are read at. None: that of the model's training.
        pooling: The output of a teacher that is its embedding.

    Returns:
        The model, whose ``image_size`` is the side length at which images are to be read.

    Raises:
        ModelError: There is no such model, or the size of its images is not known.
    """
    if RunFolder(Path(text)).trained_nothing:
        model = network_of(Path(text))
    else:
        model = load_teacher(
            text, mean=mean, std=std, input_size=input_size, image_size=image_size, pooling=pooling
        ).to(find_device("auto"))
    model.image_size = image_size or model.image_size or model.input_size
    if model.image_size is None:
        raise ModelError(f"{text} does not record the size of its images; give it in pixels with --image-size")
    return model


def embed_images(model: Backbone, images: Iterable[Path]) -> Iterator[Rows]:
    """Embed image files as :func:`~refilled.runs.inference.classify_by` reads them, batch by batch.

    Args:
        model: A model with an image size, as :func:`open_network` returns it.
        images: Image files, or folders whose images, at any depth, are taken.

    Raises:
        TaskError: There is no image.
        ModelError: An embedding is not finite.
    """
    assert model.image_size is not None  # ensured by open_network
    grey = None if model.grey_range is None else GreyRange(*model.grey_range)
    empty = True
    for kept, pixels, unreadable in decode_ahead(named_images(images), model.image_size, grey, _BATCH):
        empty = False
        outputs = predict(model, pixels)
        refuse_non_finite(outputs.embedding, list(map(str, kept)))
        classes = probabilities = None
        if model.class_names is not None:
            probabilities, best = outputs.logits.softmax(1).max(1)
            classes = [model.class_names[place] for place in best.tolist()]
        yield Rows(kept, outputs.embedding, classes, probabilities, unreadable)
    if empty:
        raise TaskError("no images were found; name image files, or folders that hold some")


@dataclass(frozen=True)
class Written:
    """A written table of embeddings."""

    images: int
    embedding_dim: int
    unreadable: list[tuple[Path, str]]


def write_embeddings(model: Backbone, images: Iterable[Path], file: Path, overwrite: bool = False) -> Written:
    """Embed image files and write a table: the image, its embedding and, of a student, its class and probability.

    The suffix chooses the format. ``.parquet``: ``embedding`` is a list of d float32. ``.csv``: one column per
    number, ``e0`` and following. ``.npz``: the arrays ``image``, ``embedding`` ``(N, d)``, ``class``, ``probability``.

    The file is renamed to its name when it is complete.

    Args:
        model: As :func:`open_network` returns it.
        images: Image files, or folders of them.
        file: The file to write.
        overwrite: Replace the file if it exists.

    Raises:
        RunError: The suffix is unknown, the file exists, or it cannot be written.
        TaskError: There is no image.
    """
    check_table(file, overwrite)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    count, unreadable = 0, []
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _TABLES[file.suffix.lower()](temporary, model) as table:
            for rows in embed_images(model, images):
                unreadable += rows.unreadable
                count += len(rows.images)
                if rows.images:
                    table.add(rows)
        temporary.replace(file)
        sync_folder(file.parent)
    except OSError as error:
        raise RunError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return Written(count, model.embedding_dim, unreadable)


def check_table(file: Path, overwrite: bool = False) -> None:
    """Refuse a name for a table that cannot be written, before anything is computed.

    Raises:
        RunError: The suffix is unknown, or the file exists and is not to be overwritten.
    """
    if file.suffix.lower() not in FORMATS:
        raise RunError(f"{file} must end in one of {', '.join(FORMATS)}, which names the format")
    if file.is_dir() or (file.exists() and not overwrite):
        raise RunError(f"{file} exists; choose another --out, or replace it with --overwrite")


class _Table(Protocol):
    def __init__(self, file: Path, model: Backbone) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...
    def add(self, rows: Rows) -> None: ...


class _Parquet:
    def __init__(self, file: Path, model: Backbone) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {"image": pa.string(), "embedding": pa.list_(pa.float32(), model.embedding_dim)}
        if model.class_names is not None:
            columns |= {"class": pa.string(), "probability": pa.float32()}
        self._schema = pa.schema(list(columns.items()))
        self._writer = pq.ParquetWriter(file, self._schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def add(self, rows: Rows) -> None:
        import pyarrow as pa

        flat = pa.array(rows.embedding.numpy().reshape(-1))
        embedding = pa.FixedSizeListArray.from_arrays(flat, rows.embedding.shape[1])
        columns = [pa.array(list(map(as_text, rows.images))), embedding]
        if rows.classes is not None and rows.probabilities is not None:
            columns += [pa.array(rows.classes), pa.array(rows.probabilities.numpy())]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))


class _Csv:
    def __init__(self, file: Path, model: Backbone) -> None:
        self._file = file.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        classes = [] if model.class_names is None else ["class", "probability"]
        self._writer.writerow(["image", *classes, *(f"e{place}" for place in range(model.embedding_dim))])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, rows: Rows) -> None:
        for row, (image, numbers) in enumerate(zip(rows.images, rows.embedding.numpy(), strict=True)):
            cells: list[Any] = [spreadsheet_cell(as_text(image))]
            if rows.classes is not None and rows.probabilities is not None:
                cells += [spreadsheet_cell(rows.classes[row]), f"{rows.probabilities[row].item():.6f}"]
            self._writer.writerow([*cells, *map(str, numbers)])  # the shortest that is exact for a float32


class _Npz:
    """Numbers go to a temporary file first, since an array begins with its length."""

    def __init__(self, file: Path, model: Backbone) -> None:
        self._path, self._dim, self._named = file, model.embedding_dim, model.class_names is not None
        self._numbers: IO[bytes] = TemporaryFile(dir=file.parent)  # noqa: SIM115 (closed on exit)
        self._images: list[str] = []
        self._classes: list[str] = []
        self._probabilities: list[float] = []

    def __enter__(self) -> Self:
        return self

    def add(self, rows: Rows) -> None:
        self._numbers.write(rows.embedding.numpy().tobytes())
        self._images += map(as_text, rows.images)
        if rows.classes is not None and rows.probabilities is not None:
            self._classes += rows.classes
            self._probabilities += rows.probabilities.tolist()

    def __exit__(self, *error: object) -> None:
        with self._numbers:
            if error[0] is None:
                self._write()

    def _write(self) -> None:
        arrays: dict[str, NDArray[Any]] = {"image": np.array(self._images, dtype=np.str_)}
        if self._named:
            arrays["class"] = np.array(self._classes, dtype=np.str_)
            arrays["probability"] = np.array(self._probabilities, dtype=np.float32)
        with zipfile.ZipFile(self._path, "w") as archive:
            for name, values in arrays.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, values)
            with archive.open("embedding.npy", "w", force_zip64=True) as member:
                shape = (len(self._images), self._dim)
                np.lib.format.write_array_header_1_0(member, {"shape": shape, "fortran_order": False, "descr": "<f4"})
                self._numbers.seek(0)
                while block := self._numbers.read(2**20):
                    member.write(block)


_TABLES: dict[str, type[_Table]] = {".parquet": _Parquet, ".csv": _Csv, ".npz": _Npz}
