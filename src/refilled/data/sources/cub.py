"""CUB-200-2011: 200 bird species, 5,994 training and 5,794 test photographs with a bounding box each."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refilled.data.source import Crop, Picture, Rows, Source, stamp_of
from refilled.errors import TaskError

SUMMARY = "11,788 photographs of 200 bird species, cropped to their bounding boxes; the authors' folder CUB_200_2011"
CITATION = "Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, 2011"
URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
MD5 = "97eceeb196236b17998738112f37df78"  # of the archive
_FOLDER = "CUB_200_2011"


def open_cub(data_root: Path) -> Source:
    """Open CUB-200-2011 below ``data_root``, in ``cub/CUB_200_2011/`` or ``CUB_200_2011/``.

    Classes are in the authors' order, which is alphabetical. The training and test parts are the authors'. Each image
    is the content of its bounding box, resized to a square (paper, supplement 2.1).

    References: Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, 2011.

    Raises:
        TaskError: The folder is missing, or its tables are damaged or list different images.
    """
    homes = (data_root / "cub" / _FOLDER, data_root / _FOLDER)
    for home in homes:
        if (home / "images.txt").is_file():
            return _open_folder(home)
    raise TaskError(
        f"CUB-200-2011 is not in {homes[0]}; download {URL} (1.1 GB, MD5 {MD5}) and unpack it there, or point "
        "--data-root or REFILLED_DATA at the folder that holds it. The tables are checked against each other, every "
        "image is read, and each result records a fingerprint of the pixels"
    )


def _open_folder(home: Path) -> Source:
    names = _read_table(home / "classes.txt", 1)
    files, labels, is_train, boxes = (
        _read_table(home / f"{name}.txt", fields)
        for name, fields in (("images", 1), ("image_class_labels", 1), ("train_test_split", 1), ("bounding_boxes", 4))
    )
    for name, table in (("image_class_labels", labels), ("train_test_split", is_train), ("bounding_boxes", boxes)):
        if table.keys() != files.keys():
            raise TaskError(f"{home / name}.txt and images.txt list different images; unpack {URL} again")
    numbers = {number: position for position, number in enumerate(names)}
    crops: dict[str, list[Crop]] = {"0": [], "1": []}
    positions: dict[str, list[int]] = {"0": [], "1": []}
    for image, (file,) in files.items():
        (label,), (side,) = labels[image], is_train[image]
        if label not in numbers or side not in crops:
            raise TaskError(f"image {image} in {home} has an unknown class or part; unpack {URL} again")
        crops[side].append(Crop(home / "images" / file, _corners(boxes[image], home)))
        positions[side].append(numbers[label])
    test, train = (CropPart(np.array(positions[s], dtype=np.int64), tuple(crops[s]), home / "images") for s in "01")
    classes = tuple(name.partition(".")[2].replace("_", " ") or name for (name,) in names.values())
    return Source(classes, train, None, test, fixed=True, citation=CITATION)


@dataclass(frozen=True)
class CropPart:
    """A part whose images are boxes in picture files."""

    labels: Rows
    crops: tuple[Crop, ...]
    root: Path

    def name(self, row: int) -> str:
        """Return the name of an image: its path relative to the folder of images."""
        return str(self.crops[row].path.relative_to(self.root))

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Return the crops of these rows."""
        return (self.crops[row] for row in rows)

    def stamp(self) -> str:
        """Return a digest of the states of the files and of the boxes."""
        return stamp_of((crop.path for crop in self.crops), *(str(crop.box) for crop in self.crops))


def _read_table(path: Path, fields: int) -> dict[str, list[str]]:
    """Return the fields of each line by its first field, the identity. Fields are separated by spaces."""
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read ({error}); unpack {URL} again") from error
    if not all(len(line) == 1 + fields for line in lines):
        raise TaskError(f"{path} has a line without exactly {1 + fields} fields; unpack {URL} again")
    return {identity: values for identity, *values in lines}


def _corners(box: list[str], home: Path) -> tuple[float, float, float, float]:
    try:
        left, top, width, height = map(float, box)
    except ValueError:
        raise TaskError(
            f"{home / 'bounding_boxes.txt'} has a box that is not four numbers; unpack {URL} again"
        ) from None
    return left, top, left + width, top + height
