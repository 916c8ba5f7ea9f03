"""Decoded images on disk, for data larger than memory: decoded once, then memory-mapped and gathered by index.

The images of a part are stored in one file, in the order of rows, so that a batch can be gathered from any rows, as
from a tensor in memory. The operating system decides which pages of the file stay in memory.

The file is written in shards of consecutive rows. Missing shards are decoded when they are needed, by as many processes
as torch has threads. Runs and ranks that need the same images share the work. The record of a shard is written last
and holds the digest of each of its images. A shard without a record, or with an image that does not match its digest,
is decoded again.
"""

import json
import mmap
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refilled.data.decode import describe, read_pixels
from refilled.data.grey import GreyRange
from refilled.data.partition import DIGEST, Digests, pixel_digests
from refilled.data.source import Part, Rows
from refilled.errors import TaskError
from refilled.files import cache_folder, write_atomic
from refilled.locks import lock
from refilled.workers import worker_processes

_SHARD_BYTES = 2**27
_CGROUP = Path("/sys/fs/cgroup")
_BLOCK_BYTES = 2**24  # of images that are checked at a time


class StoredImages:
    """uint8 images ``(N, 3, S, S)`` in a memory-mapped file. Indexing copies images to memory.

    It replaces a tensor wherever images are counted, gathered, or read in order.

    Args:
        file: The mapped images of a whole part ``(M, S, S, 3)``.
        rows: The rows of these images ``(N,)``.
    """

    def __init__(self, file: Tensor, rows: Tensor) -> None:
        self._file, self._rows = file, rows

    @property
    def shape(self) -> torch.Size:
        """``(N, 3, S, S)``."""
        side = self._file.shape[1]
        return torch.Size((len(self._rows), 3, side, side))

    @property
    def device(self) -> torch.device:
        """The device that images are copied to: the CPU."""
        return self._rows.device

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: slice) -> "StoredImages": ...
    @overload
    def __getitem__(self, index: Tensor | int) -> Tensor: ...
    def __getitem__(self, index: Tensor | slice | int) -> "Tensor | StoredImages":
        """Return a copy of the images at these positions, in channels-last memory. A slice is a view without a copy."""
        rows = self._rows[index]
        return StoredImages(self._file, rows) if isinstance(index, slice) else self._file[rows].movedim(-1, -3)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Return a copy of the images at the positions ``(B,)``. ``dim`` must be 0."""
        assert dim == 0
        return self._file.index_select(0, self._rows[index]).permute(0, 3, 1, 2)

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield copies of blocks of ``size`` images."""
        return (self[positions] for positions in torch.arange(len(self)).split(size))

    def keep(self, wanted: NDArray[np.bool_]) -> "StoredImages":
        """Return the images for which ``wanted`` ``(N,)`` is true, without a copy."""
        return StoredImages(self._file, self._rows[torch.from_numpy(wanted)])


class JoinedImages:
    """The images of two parts as one, those of the first part before those of the second. Nothing is copied.

    Args:
        first: uint8 images ``(N, 3, S, S)``, in memory or on disk.
        second: As ``first``, ``(M, 3, S, S)``.
    """

    def __init__(self, first: "Tensor | StoredImages", second: "Tensor | StoredImages") -> None:
        self._first, self._second = first, second

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of images in each part."""
        return len(self._first), len(self._second)

    @property
    def shape(self) -> torch.Size:
        """``(N + M, 3, S, S)``."""
        return torch.Size((len(self), *self._first.shape[1:]))

    @property
    def device(self) -> torch.device:
        """The device of both parts, or the CPU if they are on different devices."""
        devices = {self._first.device, self._second.device}
        return devices.pop() if len(devices) == 1 else torch.device("cpu")

    def __len__(self) -> int:
        return sum(self.lengths)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Return a copy of the images at the positions ``(B,)``. ``dim`` must be 0."""
        assert dim == 0
        index = index.cpu()
        of_first = index < len(self._first)
        blocks = [
            gathered(part, positions).to(self.device)
            for part, positions in (
                (self._first, index[of_first]),
                (self._second, index[~of_first] - len(self._first)),
            )
        ]
        order = torch.cat([of_first.nonzero(), (~of_first).nonzero()]).squeeze(1)
        return gathered(torch.cat(blocks), order.argsort())


Pixels = Tensor | StoredImages
"""uint8 images ``(N, 3, S, S)`` in memory or on disk."""

SeenPixels = Pixels | JoinedImages
"""The images of one part or of two joined parts."""


def gathered(pixels: SeenPixels, index: Tensor) -> Tensor:
    """Return a copy of the images at the positions ``(B,)``, in channels-last memory.

    ``index_select`` of a tensor returns PyTorch's own layout. The copy would be transposed, and by whoever needs
    channels-last memory once more, which takes longer than to draw the view.
    """
    index = index.to(pixels.device)
    if isinstance(pixels, Tensor):
        return pixels.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return pixels.index_select(0, index)


class Stored(NamedTuple):
    """The stored images of some rows."""

    images: StoredImages
    """The readable images."""
    reasons: dict[int, str]
    """For each unreadable image, its position among the rows and the reason."""
    digests: Digests
    """Digests of the readable images."""


def stored_images(part: Part, rows: Rows, size: int, grey: GreyRange | None = None) -> Stored:
    """Map the images of some rows of a part from disk, and decode those that are missing.

    The images are stored below :func:`~refilled.files.cache_folder`, in a folder for the current state of the part's
    files and the size. Every image is checked against its digest, which takes one or two seconds per gigabyte on one
    thread.

    Args:
        part: The part of the images.
        rows: Their rows ``(N,)``, ascending.
        size: Side length S in pixels.
        grey: Black and white of pictures with more than 8 bits per channel. None: such pictures are unreadable.

    Raises:
        TaskError: The disk is full, or does not return what was written to it.
    """
    store = _Store(cache_folder() / "images" / _key(part, size, grey), part, size, grey)
    records = store.records(np.unique(rows // store.shard_rows).tolist())
    unreadable = {row: reason for record in records.values() for row, reason in record.reasons.items()}
    positions = np.flatnonzero(np.isin(rows, list(unreadable)))
    readable = np.delete(rows, positions)
    stored = np.concatenate([store.rows_of(shard) for shard in records])
    digests = np.concatenate([record.digests for record in records.values()])[np.searchsorted(stored, readable)]
    reasons = {int(position): unreadable[int(rows[position])] for position in positions}
    return Stored(StoredImages(store.map(), torch.from_numpy(readable)), reasons, digests)


def free_memory() -> int:
    """Return the bytes of free memory that the system reports, or 16 GiB if it reports none."""
    with suppress(OSError):
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        free = 1024 * int(available[1]) if available else 2**34
        with suppress(OSError, ValueError):  # no container, or no limit
            limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
            free = min(free, limit - used)
        return free
    return 2**34


def _key(part: Part, size: int, grey: GreyRange | None) -> str:
    """Return the name of the folder of a part's images."""
    identity = [part.stamp(), len(part.labels), size, 1, *([] if grey is None else [grey])]
    return sha256(json.dumps(identity).encode()).hexdigest()[:16]


class _Record(NamedTuple):
    """The record of a decoded shard: the reason for each unreadable row, and the digest of each row."""

    reasons: dict[int, str]
    digests: Digests

    def to_bytes(self) -> bytes:
        return json.dumps(self.reasons).encode() + b"\n" + self.digests.tobytes()

    @classmethod
    def from_bytes(cls, content: bytes) -> "_Record":
        reasons, _, digests = content.partition(b"\n")
        return cls({int(row): why for row, why in json.loads(reasons).items()}, np.frombuffer(digests, DIGEST))


@dataclass(frozen=True)
class _Store:
    """The folder of a part's images at one size. It holds the shards that have been needed so far."""

    folder: Path
    part: Part
    size: int
    grey: GreyRange | None

    @property
    def shard_rows(self) -> int:
        return max(1, _SHARD_BYTES // self._image_bytes)

    @property
    def _image_bytes(self) -> int:
        return 3 * self.size**2

    @property
    def _file(self) -> Path:
        return self.folder / "images.u8"

    def records(self, shards: Sequence[int]) -> dict[int, _Record]:
        """Return the records of these shards. Missing and damaged shards are decoded first."""
        records = dict(zip(shards, self._whole(shards), strict=True))
        missing = [shard for shard, record in records.items() if record is None]
        try:
            self._make_all(missing)
        except OSError as error:
            raise TaskError(
                f"the decoded images cannot be written to {self.folder} ({describe(error)}): they need "
                f"{len(self.part.labels) * self._image_bytes / 2**30:.1f} GiB at most; point REFILLED_CACHE at another "
                "disk, or use a smaller image size; the same command then resumes"
            ) from error
        records |= dict(zip(missing, self._whole(missing), strict=True))
        for shard, record in records.items():
            if record is None:
                raise TaskError(f"{self.folder} does not hold what was written to it (shard {shard}); check the disk")
        return {shard: record for shard, record in records.items() if record is not None}

    def map(self) -> Tensor:
        """Map all images into memory, read-only, ``(M, S, S, 3)``."""
        with self._file.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        shape = (len(self.part.labels), self.size, self.size, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about read-only memory
            return torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8).reshape(shape))

    def make(self, shard: int) -> None:
        """Decode a shard, unless another process has done so. Wait for a process that is decoding it."""
        with self._alone(shard):
            if self._checked(shard) is None:
                self._decode(shard)

    def rows_of(self, shard: int) -> Rows:
        """Return the rows of a shard, ascending."""
        start = shard * self.shard_rows
        return np.arange(start, min(start + self.shard_rows, len(self.part.labels)))

    def _make_all(self, shards: Sequence[int]) -> None:
        if not shards:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab") as file:
            # A sparse file: shards that are not decoded take no room.
            os.truncate(file.fileno(), len(self.part.labels) * self._image_bytes)
        workers = min(torch.get_num_threads(), len(shards))
        if workers > 1:
            with suppress(BrokenProcessPool), worker_processes(workers, _begin_worker, self) as executor:
                list(executor.map(_make_shard, shards))
        for shard, record in zip(shards, self._whole(shards), strict=True):
            if record is None:  # with one worker: all; else the shards of a worker that was killed
                self.make(shard)

    def _decode(self, shard: int) -> None:
        rows = self.rows_of(shard)
        pixels, reasons = read_pixels(self.part.pictures(rows), len(rows), self.size, self.grey)
        readable = np.delete(np.arange(len(rows)), list(reasons))
        digests = np.zeros(len(rows), dtype=DIGEST)
        digests[readable] = pixel_digests(pixels)
        start, length = (count * self._image_bytes for count in (int(rows[0]), len(rows)))
        with self._file.open("r+b") as file:
            # Reserve the room: a write to a mapped file on a full disk would kill the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), start, length)
            target = np.memmap(file, np.uint8, "r+", start, (len(rows), self.size, self.size, 3))
            target[readable] = pixels.permute(0, 2, 3, 1).numpy()
            target.flush()
            os.fsync(file.fileno())
        record = _Record({int(rows[position]): reason for position, reason in reasons.items()}, digests)
        write_atomic(self._record(shard), record.to_bytes())

    def _whole(self, shards: Sequence[int]) -> list[_Record | None]:
        """Return the record of each shard that is stored and matches its digests; None for the others."""
        with ThreadPoolExecutor(torch.get_num_threads()) as executor:
            return list(executor.map(self._checked, shards))

    def _checked(self, shard: int) -> _Record | None:
        rows, step = self.rows_of(shard), max(1, _BLOCK_BYTES // self._image_bytes)
        with suppress(OSError, ValueError):
            record = _Record.from_bytes(self._record(shard).read_bytes())
            if all(self._holds(rows[at : at + step], record, at) for at in range(0, len(rows), step)):
                return record
        return None

    def _holds(self, rows: Rows, record: _Record, at: int) -> bool:
        count = len(rows) * self._image_bytes
        content = np.fromfile(self._file, np.uint8, count, offset=int(rows[0]) * self._image_bytes)
        if len(content) < count:
            return False
        images = torch.from_numpy(content).view(len(rows), self.size, self.size, 3).permute(0, 3, 1, 2)
        readable = [position for position, row in enumerate(rows.tolist()) if row not in record.reasons]
        return bool(np.array_equal(pixel_digests(images)[readable], record.digests[at : at + len(rows)][readable]))

    def _record(self, shard: int) -> Path:
        return self.folder / f"{shard:06}.shard"

    @contextmanager
    def _alone(self, shard: int) -> Iterator[None]:
        """Hold the lock of a shard. The system releases it when the process ends."""
        with (self.folder / ".lock").open("a") as file:
            lock(file, shard)  # one byte of the file per shard
            yield


_store: _Store  # of a worker process, which receives it once, not with every shard


def _begin_worker(store: _Store) -> None:
    global _store
    _store = store
    torch.set_num_threads(1)


def _make_shard(shard: int) -> None:
    _store.make(shard)
