"""CIFAR-100: 100 classes with 500 training and 100 test images each, 32x32."""

import logging
import os
import pickle
import shutil
import tarfile
from hashlib import file_digest
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any
from urllib.request import urlopen

import numpy as np

from refilled.data.source import ArrayPart, Source
from refilled.data.sources.parquet import is_parquet, open_parquet
from refilled.errors import TaskError

SUMMARY = "60,000 photographs, 100 classes, 32x32; Parquet or the authors' files, else downloaded (161 MB)"
CITATION = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"
URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
MD5 = "eb9058c3a382ffc7106e4002c42a8d85"  # of the archive, as published
_FOLDER = "cifar-100-python"
_FILES = ("meta", "test", "train")  # train is written last: its presence shows that the download is complete

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"): ("numpy", "ndarray"),
    ("numpy", "dtype"): ("numpy", "dtype"),
    ("_codecs", "encode"): ("_codecs", "encode"),  # how Python 3 pickles bytes for Python 2
}


def open_cifar100(data_root: Path, image: str | None = None, label: str | None = None) -> Source:
    """Open CIFAR-100 below ``data_root``. If it is missing, download it.

    Two formats are read: Parquet (``cifar100/train.parquet``, ``cifar100/test.parquet``), and the authors' Python files
    (``cifar100/cifar-100-python/{train,test,meta}`` or ``cifar-100-python/{train,test,meta}``). Both give the same
    classes in the same order.

    References: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Raises:
        TaskError: It is missing and cannot be downloaded, or a file is damaged.
    """
    home = data_root / "cifar100"
    if is_parquet(home):
        table = open_parquet(home, image, label)
        return Source(table.classes, table.train, table.val, table.test, image_size=32, fixed=True, citation=CITATION)
    if image or label:
        raise TaskError("CIFAR-100 has columns to choose from only in Parquet files; leave out @image= and @label=")
    for folder in (home / _FOLDER, data_root / _FOLDER):
        if (folder / "train").is_file():
            return _open_pickles(folder)
    _download(home)
    return _open_pickles(home / _FOLDER)


def _open_pickles(folder: Path) -> Source:
    names = load_pickle(folder / "meta").get("fine_label_names", [])
    classes = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    parts = {}
    for part in ("train", "test"):
        content = load_pickle(folder / part)
        pixels, labels = content.get("data"), content.get("fine_labels")
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or not isinstance(labels, list):
            raise TaskError(f"{folder / part} does not hold CIFAR-100's images; download it again from {URL}")
        if pixels.shape != (len(labels), 3072) or not all(label in range(len(classes)) for label in labels):
            raise TaskError(
                f"{folder / part} has labels that do not match its images or class names; download it again from {URL}"
            )
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts[part] = ArrayPart(np.array(labels, dtype=np.int64), images, part)
    return Source(classes, parts["train"], None, parts["test"], image_size=32, fixed=True, citation=CITATION)


class _AllowList(pickle.Unpickler):
    """Unpickler for arrays and plain containers. It refuses every other global name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(*_ALLOWED[module, name])


def load_pickle(file: Path) -> dict[str, Any]:
    """Load one of the authors' pickles: a dictionary of arrays and lists, with text keys.

    Raises:
        TaskError: The file is damaged, or refers to anything but NumPy arrays. No code of the file is run.
    """
    try:
        content = _AllowList(BytesIO(file.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises errors of nearly any kind
        raise TaskError(f"{file} is not a file of CIFAR-100 ({error}); download it again from {URL}") from error
    if not isinstance(content, dict):
        raise TaskError(f"{file} is not a file of CIFAR-100 (it holds no dictionary); download it again from {URL}")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def _download(home: Path) -> None:
    advice = (
        f"download {URL} and unpack it to {home / _FOLDER}, or point --data-root or REFILLED_DATA at the folder that "
        "holds it"
    )
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise TaskError(f"CIFAR-100 is not below {home}, and downloads are off (HF_HUB_OFFLINE); {advice}")
    logging.getLogger(__name__).warning("downloading CIFAR-100 (161 MB) from %s to %s", URL, home)
    try:
        with TemporaryFile() as archive:
            with urlopen(URL, timeout=60) as response:
                shutil.copyfileobj(response, archive)
            archive.seek(0)
            if file_digest(archive, "md5").hexdigest() != MD5:
                raise OSError("the MD5 checksum does not match")
            archive.seek(0)
            _unpack(archive, home / _FOLDER)
    except (OSError, HTTPException, tarfile.TarError, KeyError) as error:
        raise TaskError(f"CIFAR-100 is not below {home} and could not be downloaded ({error}); {advice}") from error


def _unpack(archive: IO[bytes], folder: Path) -> None:
    """Extract the three files by name, so that the archive cannot choose where files are written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=archive) as opened:
        for name in _FILES:
            member = opened.extractfile(f"{_FOLDER}/{name}")
            if member is None:
                raise KeyError(f"{name} is not a file in the archive")
            unfinished = folder / f"{name}.part"
            unfinished.write_bytes(member.read())
            unfinished.replace(folder / name)
