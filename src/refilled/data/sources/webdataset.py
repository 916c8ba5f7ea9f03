"""WebDataset shards: tar files in which members that share a name up to its first dot are one sample.

Nothing is extracted. The headers are read once, to find the labels and where in the file each image lies; an image is
then read from there. A member's name decides what it is and to which sample it belongs, and is used for nothing else.
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

_LABEL = "cls"  # what the label's name ends in, by WebDataset's custom
_LONGEST_LABEL = 1000  # bytes
_LARGEST_IMAGE = 2**27  # bytes; more of a member is not read
_BLOCK = 512  # bytes; the unit of a tar file


def open_webdataset(path: Path, image: str | None = None, label: str | None = None, *, labelled: bool = True) -> Source:
    """Open one tar file, or a folder of them; not compressed, since compressed ones can be read from the start only.

    A shard belongs to the part that its name says, as in ``train-0001.tar``; if no name does so, all of them are
    training part. A label is text, or an integer, in a member of its own. Links, devices and sparse members are passed
    over.

    Args:
        path: The file or the folder.
        image: What the names of images end in, after the first dot; the ending of the only image in the first sample
            if None.
        label: What the names of labels end in; ``cls`` if None.
        labelled: Whether labels are needed; if not, none is read and all images are of one class.

    Raises:
        TaskError: There are no shards, one is damaged, or a sample has no label.
    """
    files = _part_files(path)
    if "train" not in files:
        raise TaskError(f"{path} has no training part; name its shards train-0000.tar and so on")
    image = image or _find_image(files["train"][0])
    ending = (label or _LABEL) if labelled else None
    found = {part: [_list_shard(file, image, ending) for file in shards] for part, shards in files.items()}
    whole = all(
        re.fullmatch("[0-9]{1,9}", text) for shards in found.values() for shard in shards for text in shard.labels
    )
    cells = {
        part: [
            Cells(str(file), list(map(int, shard.labels)) if whole else shard.labels)
            for file, shard in zip(files[part], shards, strict=True)
        ]
        for part, shards in found.items()
    }
    classes, labels = read_labels(cells, label or _LABEL) if labelled else _one_class(found)
    parts = {
        part: TarPart(
            labels[part],
            tuple(files[part]),
            np.cumsum([0, *(len(shard.labels) for shard in shards[:-1])]),
            np.concatenate([shard.places for shard in shards]),
            image,
        )
        for part, shards in found.items()
    }
    return Source(classes, parts["train"], parts.get("val"), parts.get("test"))


@dataclass(frozen=True)
class TarPart:
    """A part of a data set that lies in tar files."""

    labels: Rows
    files: tuple[Path, ...]
    starts: Rows
    """The row at which each file begins."""
    places: Rows
    """Offset and length of each image in its file ``(N, 2)``; length 0 where a sample has none."""
    image: str

    def name(self, row: int) -> str:
        """Return the origin of an image: ``train-0001.tar#17``. A member's name may be anything, so it is not used."""
        shard = bisect(self.starts, row) - 1
        return f"{self.files[shard].name}#{row - self.starts[shard]}"

    def pictures(self, rows: Rows) -> Iterator[Picture]:
        """Read the encoded pictures of these rows."""
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        for shard in np.unique(shards).tolist():
            with self.files[shard].open("rb") as opened:
                for offset, length in self.places[rows[shards == shard]].tolist():
                    opened.seek(offset)
                    yield opened.read(min(length, _LARGEST_IMAGE))

    def stamp(self) -> str:
        """Digest the states of the files, and the ending of images."""
        return stamp_of(self.files, self.image)


@dataclass(frozen=True)
class _Shard:
    """The samples of a tar file."""

    labels: list[str]
    places: Rows


def _part_files(path: Path) -> dict[str, list[Path]]:
    found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    files = [file for file in found if regular_file_size(file) is not None]  # opening a pipe would wait for ever
    if not files:
        raise TaskError(f"{path} has no tar files; WebDataset shards end in .tar, not compressed")
    parts = by_part(((file, file.name) for file in files), path) if path.is_dir() else {}
    return parts or {"train": files}


def _members(file: Path) -> Iterator[tarfile.TarInfo]:
    """Give the regular members of a tar file."""
    try:
        with tarfile.open(file, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # or it would keep them all
                if member.isreg() and not member.issparse():
                    yield member
            end = archive.offset
        with file.open("rb") as opened:  # tarfile takes a damaged header in the middle for the end
            opened.seek(end)
            if opened.read(_BLOCK).strip(b"\0"):
                raise tarfile.ReadError(f"damaged at byte {end}")
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise TaskError(f"{file} cannot be read as a tar file ({error}); write or download it again") from error


def _samples(file: Path) -> Iterator[list[tuple[str, tarfile.TarInfo]]]:
    """Give the members of one sample after the other, each with what its name ends in."""

    def name_of(member: tarfile.TarInfo) -> tuple[str, str]:
        folder, slash, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        return (f"{folder}{slash}{stem}" if stem else ""), ending

    named = ((*name_of(member), member) for member in _members(file))
    for stem, group in groupby(named, key=lambda found: found[0]):
        if stem:  # hidden files are no samples
            yield [(ending, member) for _, ending, member in group]


def _find_image(file: Path) -> str:
    members = dict(next(_samples(file), []))
    images = [ending for ending in members if f".{ending.lower()}" in SUFFIXES]
    if len(images) != 1:
        raise TaskError(
            f"cannot tell which members of {file} are the images: its first sample has {_listed(members)}; add "
            "@image=ENDING to the task"
        )
    return images[0]


def _one_class(found: Mapping[str, Sequence[_Shard]]) -> tuple[tuple[str, ...], dict[str, Rows]]:
    """Return one class, and its label for every sample of every part."""
    return ("",), {
        part: np.zeros(sum(len(shard.labels) for shard in shards), dtype=np.int64) for part, shards in found.items()
    }


def _list_shard(file: Path, image: str, label: str | None) -> _Shard:
    """List a shard's samples; without the ending of a label, all labels are empty."""
    labels, places = [], []
    with file.open("rb") as opened:
        for number, sample in enumerate(_samples(file)):
            members = dict(reversed(sample))  # the first of a name counts
            found = members.get(image)
            places.append((found.offset_data, found.size) if found else (0, 0))
            if label is None:
                labels.append("")
                continue
            if label not in members or members[label].size > _LONGEST_LABEL:
                raise TaskError(
                    f"{file}: sample {number} has no label of at most {_LONGEST_LABEL} bytes that ends in .{label}; it "
                    f"has {_listed(members)}. Add @label=ENDING to the task, or mend the shard"
                )
            opened.seek(members[label].offset_data)
            text = opened.read(members[label].size).decode("utf-8", "replace").strip()
            labels.append(intern(text))  # one text for each class, and not for each of millions of images
    return _Shard(labels, np.array(places, dtype=np.int64).reshape(-1, 2))


def _listed(members: Iterable[str]) -> str:
    return ", ".join(map(ascii, islice(members, 8))) or "nothing"
