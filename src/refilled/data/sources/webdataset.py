"""WebDataset shards: tar files in which members that share a name up to its first dot are one sample.

Nothing is extracted. The headers are read once, to find the labels and the position of each image in the file. Images
are then read from these positions. The name of a member decides its sample and its kind, and is used for nothing else.
"""

import re
import tarfile
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from sys import intern

import numpy as np

from refilled.data.decode import SUFFIXES, regular_file_size
from refilled.data.source import Picture, Rows, Source, by_part, stamp_of
from refilled.data.sources.columns import Cells, read_labels
from refilled.errors import TaskError

_LABEL = "cls"  # the usual ending of the name of a label
_LONGEST_LABEL = 1000  # bytes
_LARGEST_IMAGE = 2**27  # bytes; the rest of a larger member is not read
_BLOCK = 512  # bytes; the unit of a tar file


def open_webdataset(path: Path, image: str | None = None, label: str | None = None, *, labelled: bool = True) -> Source:
    """Open one tar file, or a folder of them. Compressed files are refused: they can only be read from the start.

    A shard belongs to the part in its name, as in ``train-0001.tar``. If no name contains a part, all shards belong to
    the training part. A label is text or an integer in a member of its own. Links, devices and sparse members are
    ignored.

    Args:
        path: The file or the folder.
        image: Ending of the names of images, after the first dot. None: that of the only image in the first sample.
        label: Ending of the names of labels. None: ``cls``.
        labelled: Whether labels are needed. If not, none are read and all images belong to one class.

    Raises:
        TaskError: There are no shards, one is damaged, or a sample has no label.
    """
    files = _part_files(path)
    if "train" not in files:
        raise TaskError(f"{path} has no training part; name its shards train-0000.tar, train-0001.tar, ...")
    image = image or _find_image(files["train"][0])
    ending = (label or _LABEL) if labelled else None
    shards = {part: [_read_shard(file, image, ending) for file in paths] for part, paths in files.items()}
    are_integers = all(
        re.fullmatch("[0-9]{1,9}", text) for listed in shards.values() for shard in listed for text in shard.labels
    )
    cells = {
        part: [
            Cells(str(file), list(map(int, shard.labels)) if are_integers else shard.labels)
            for file, shard in zip(files[part], listed, strict=True)
        ]
        for part, listed in shards.items()
    }
    classes, labels = read_labels(cells, label or _LABEL) if labelled else _one_class(shards)
    parts = {
        part: TarPart(
            labels[part],
            tuple(files[part]),
            np.cumsum([0, *(len(shard.labels) for shard in listed[:-1])]),
            np.concatenate([shard.places for shard in listed]),
            image,
        )
        for part, listed in shards.items()
    }
    return Source(classes, parts["train"], parts.get("val"), parts.get("test"))


@dataclass(frozen=True)
class TarPart:
    """A part that is stored in tar files."""

    labels: Rows
    files: tuple[Path, ...]
    starts: Rows
    """The first row of each file."""
    places: Rows
    """Offset and length in bytes of each image in its file ``(N, 2)``; length 0 if a sample has no image."""
    image: str

    def name(self, row: int) -> str:
        """Return the name of an image, such as ``train-0001.tar#17``; the names of members may be anything."""
        shard = bisect(self.starts, row) - 1
        return f"{self.files[shard].name}#{row - self.starts[shard]}"

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Yield the encoded pictures of these rows."""
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        for shard in np.unique(shards).tolist():
            with self.files[shard].open("rb") as opened:
                for offset, length in self.places[rows[shards == shard]].tolist():
                    opened.seek(offset)
                    yield opened.read(min(length, _LARGEST_IMAGE))

    def stamp(self) -> str:
        """Return a digest of the states of the files and of the ending of images."""
        return stamp_of(self.files, self.image)


@dataclass(frozen=True)
class _Shard:
    """The samples of a tar file."""

    labels: list[str]
    places: Rows


def _part_files(path: Path) -> dict[str, list[Path]]:
    paths = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    files = [file for file in paths if regular_file_size(file) is not None]  # opening a pipe would block
    if not files:
        raise TaskError(f"{path} has no tar files; WebDataset shards are uncompressed files that end in .tar")
    parts = by_part(((file, file.name) for file in files), path) if path.is_dir() else {}
    return parts or {"train": files}


def _members(file: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the regular members of a tar file."""
    try:
        with tarfile.open(file, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else it would keep all of them in memory
                if member.isreg() and not member.issparse():
                    yield member
            end = archive.offset
        with file.open("rb") as opened:  # tarfile takes a damaged header for the end of the archive
            opened.seek(end)
            if opened.read(_BLOCK).strip(b"\0"):
                raise tarfile.ReadError(f"damaged at byte {end}")
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise TaskError(f"{file} cannot be read as a tar file ({error}); write or download it again") from error


def _samples(file: Path) -> Iterator[list[tuple[str, tarfile.TarInfo]]]:
    """Yield the members of each sample, each with the ending of its name."""

    def name_of(member: tarfile.TarInfo) -> tuple[str, str]:
        folder, slash, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        return (f"{folder}{slash}{stem}" if stem else ""), ending

    named = ((*name_of(member), member) for member in _members(file))
    for stem, group in groupby(named, key=lambda member: member[0]):
        if stem:  # hidden files are not samples
            yield [(ending, member) for _, ending, member in group]


def _find_image(file: Path) -> str:
    members = dict(next(_samples(file), []))
    images = [ending for ending in members if f".{ending.lower()}" in SUFFIXES]
    if len(images) != 1:
        raise TaskError(
            f"cannot tell which members of {file} are images: its first sample has {_listed(members)}; add "
            "@image=ENDING to the task"
        )
    return images[0]


def _one_class(shards: Mapping[str, Sequence[_Shard]]) -> tuple[tuple[str, ...], dict[str, Rows]]:
    """Return one class, and label 0 for every sample of every part."""
    return ("",), {
        part: np.zeros(sum(len(shard.labels) for shard in listed), dtype=np.int64) for part, listed in shards.items()
    }


def _read_shard(file: Path, image: str, label: str | None) -> _Shard:
    """Return the samples of a shard. If no ending of labels is given, all labels are empty."""
    labels, places = [], []
    with file.open("rb") as opened:
        for number, sample in enumerate(_samples(file)):
            members = dict(reversed(sample))  # the first member of a name takes precedence
            member = members.get(image)
            places.append((member.offset_data, member.size) if member else (0, 0))
            if label is None:
                labels.append("")
                continue
            if label not in members or members[label].size > _LONGEST_LABEL:
                raise TaskError(
                    f"{file}: sample {number} has no label of at most {_LONGEST_LABEL} bytes that ends in .{label}; it "
                    f"has {_listed(members)}. Add @label=ENDING to the task, or repair the shard"
                )
            opened.seek(members[label].offset_data)
            text = opened.read(members[label].size).decode("utf-8", "replace").strip()
            labels.append(intern(text))  # one string per class, not one per image
    return _Shard(labels, np.array(places, dtype=np.int64).reshape(-1, 2))


def _listed(members: Iterable[str]) -> str:
    return ", ".join(map(ascii, islice(members, 8))) or "nothing"
