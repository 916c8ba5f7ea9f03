"""Decoded images on disk, for data larger than memory: decoded once, then mapped and gathered by index.

The images of a part lie in one file, row after row, so that any batch is gathered from anywhere in it and everything
else stays as it is for images in memory. What of it is mapped is the system's to keep or to drop. The file is made in
shards of consecutive rows, those that are wanted and missing, by as many processes as there are threads; other runs and
ranks that want the same share the work. A shard's record, written last, holds the digest of each of its images: without
a record the shard is made again, and so it is where an image is no longer what the record says.
"""

import json
import mmap
import multiprocessing
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
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

_SHARD_BYTES = 2**27
_CGROUP = Path("/sys/fs/cgroup")
_BLOCK_BYTES = 2**24  # of images that are looked at together when a shard is checked


class StoredImages:
    """uint8 images ``(N, 3, S, S)`` that lie in a mapped file; those that are asked for are copied to memory.

    It stands in for a tensor where images are counted, gathered or gone through in their order.

    Args:
        file: The mapped images of a whole part ``(M, S, S, 3)``.
        rows: Which of them are meant ``(N,)``.
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
        """The processor's memory, where they are copied to."""
        return self._rows.device

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: slice) -> "StoredImages": ...
    @overload
    def __getitem__(self, index: Tensor | int) -> Tensor: ...
    def __getitem__(self, index: Tensor | slice | int) -> "Tensor | StoredImages":
        """Copy the images at these positions, in channels-last memory; of a slice, nothing is copied yet."""
        rows = self._rows[index]
        return StoredImages(self._file, rows) if isinstance(index, slice) else self._file[rows].movedim(-1, -3)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Copy the images at the positions ``(B,)``; ``dim`` must be 0."""
        assert dim == 0
        return self._file.index_select(0, self._rows[index]).permute(0, 3, 1, 2)

    def split(self, size: int) -> Iterator[Tensor]:
        """Copy block after block of ``size`` images."""
        return (self[positions] for positions in torch.arange(len(self)).split(size))

    def keep(self, wanted: NDArray[np.bool_]) -> "StoredImages":
        """Leave out the others."""
        return StoredImages(self._file, self._rows[torch.from_numpy(wanted)])


class JoinedImages:
    """The images of two parts as one: those of the first, then those of the second; nothing is copied.

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
        """Where both parts are, or the processor's memory if they are in different places."""
        places = {self._first.device, self._second.device}
        return places.pop() if len(places) == 1 else torch.device("cpu")

    def __len__(self) -> int:
        return sum(self.lengths)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Copy the images at the positions ``(B,)``; ``dim`` must be 0."""
        assert dim == 0
        index = index.cpu()
        of_first = index < len(self._first)
        found = [
            part.index_select(0, positions.to(part.device)).to(self.device)
            for part, positions in (
                (self._first, index[of_first]),
                (self._second, index[~of_first] - len(self._first)),
            )
        ]
        order = torch.cat([of_first.nonzero(), (~of_first).nonzero()]).squeeze(1)
        return torch.cat(found).index_select(0, order.argsort().to(self.device))


Pixels = Tensor | StoredImages
"""uint8 images ``(N, 3, S, S)`` in memory or on disk."""

SeenPixels = Pixels | JoinedImages
"""Images that training sees, of one part or of two."""


class Stored(NamedTuple):
    """What is found of the rows that were asked for."""

    images: StoredImages
    """Those that could be read."""
    reasons: dict[int, str]
    """For each other one its position among the rows, and why."""
    digests: Digests
    """Of the images."""


def stored_images(part: Part, rows: Rows, size: int, grey: GreyRange | None = None) -> Stored:
    """Map the images of some rows of a part from disk, decoding those that are missing.

    They lie below :func:`~refilled.files.cache_folder`, in a folder for the present state of the part's files and the
    size. Every image is checked against its digest, which takes one or two seconds per gigabyte on one thread.

    Args:
        part: Where the images come from.
        rows: Which ones ``(N,)``, ascending.
        size: Side length S in pixels.
        grey: Black and white of pictures with more than 8 bits a channel; None to refuse those.

    Raises:
        TaskError: There is no room on the disk, or it does not keep what is written to it.
    """
    store = _Store(cache_folder() / "images" / _key(part, size, grey), part, size, grey)
    records = store.records(np.unique(rows // store.shard_rows).tolist())
    unreadable = {row: reason for record in records.values() for row, reason in record.reasons.items()}
    positions = np.flatnonzero(np.isin(rows, list(unreadable)))
    readable = np.delete(rows, positions)
    made = np.concatenate([store.rows_of(shard) for shard in records])
    digests = np.concatenate([record.digests for record in records.values()])[np.searchsorted(made, readable)]
    reasons = {int(position): unreadable[int(rows[position])] for position in positions}
    return Stored(StoredImages(store.map(), torch.from_numpy(readable)), reasons, digests)


def free_memory() -> int:
    """Bytes of memory that processes can still have, as far as the system tells; 16 GiB where it does not."""
    with suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        free = 1024 * int(found[1]) if found else 2**34
        with suppress(OSError, ValueError):  # no container, or one without a limit
            limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
            free = min(free, limit - used)
        return free
    return 2**34


def _key(part: Part, size: int, grey: GreyRange | None) -> str:
    known_by = [part.stamp(), len(part.labels), size, 1, *([] if grey is None else [grey])]
    return sha256(json.dumps(known_by).encode()).hexdigest()[:16]


class _Record(NamedTuple):
    """What is known of a finished shard: by row, why it is unreadable; and the digest of each of its rows."""

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
    """The images of a part at one size, in a folder: those of the shards that have been wanted so far."""

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
        """Return the records of these shards, all of them whole; what is missing or damaged is made first."""
        found = dict(zip(shards, self._whole(shards), strict=True))
        missing = [shard for shard, record in found.items() if record is None]
        try:
            self._make_all(missing)
        except OSError as error:
            raise TaskError(
                f"the decoded images cannot be written to {self.folder} ({describe(error)}): they take "
                f"{len(self.part.labels) * self._image_bytes / 2**30:.1f} GiB at most; point REFILLED_CACHE at another "
                "disk, or use a smaller image size; the same command then resumes"
            ) from error
        found |= dict(zip(missing, self._whole(missing), strict=True))
        for shard, record in found.items():
            if record is None:
                raise TaskError(f"{self.folder} does not hold what was written to it (shard {shard}); look at the disk")
        return {shard: record for shard, record in found.items() if record is not None}

    def map(self) -> Tensor:
        """Map all images into memory, to be read only ``(M, S, S, 3)``."""
        with self._file.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        shape = (len(self.part.labels), self.size, self.size, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of memory that is not to be written to
            return torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8).reshape(shape))

    def make(self, shard: int) -> None:
        """Decode a shard, unless another process has done so; if one is just doing it, wait for it."""
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
            os.truncate(file.fileno(), len(self.part.labels) * self._image_bytes)  # with holes for what is not made
        workers = min(torch.get_num_threads(), len(shards))
        if workers > 1:
            # Not forked: torch's threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            with suppress(BrokenProcessPool), ProcessPoolExecutor(workers, context, _begin_worker, (self,)) as pool:
                list(pool.map(_make_shard, shards))
        for shard, record in zip(shards, self._whole(shards), strict=True):
            if record is None:  # all of them, or what an ended worker has left undone
                self.make(shard)

    def _decode(self, shard: int) -> None:
        rows = self.rows_of(shard)
        pixels, reasons = read_pixels(self.part.pictures(rows), len(rows), self.size, self.grey)
        readable = np.delete(np.arange(len(rows)), list(reasons))
        digests = np.zeros(len(rows), dtype=DIGEST)
        digests[readable] = pixel_digests(pixels)
        start, length = (count * self._image_bytes for count in (int(rows[0]), len(rows)))
        with self._file.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):  # claim the room now: a disk full later would kill the process
                os.posix_fallocate(file.fileno(), start, length)
            target = np.memmap(file, np.uint8, "r+", start, (len(rows), self.size, self.size, 3))
            target[readable] = pixels.permute(0, 2, 3, 1).numpy()
            target.flush()
            os.fsync(file.fileno())
        record = _Record({int(rows[position]): reason for position, reason in reasons.items()}, digests)
        write_atomic(self._record(shard), record.to_bytes())

    def _whole(self, shards: Sequence[int]) -> list[_Record | None]:
        """Look up the records of those shards that are there and hold what they should."""
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return list(pool.map(self._checked, shards))

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
        """Wait until no other process is at a shard; the system lets go when a process ends."""
        with (self.folder / ".lock").open("a") as file:
            lock(file, shard)
            yield


_store: _Store  # of a worker process, which is given it once and not with every shard


def _begin_worker(store: _Store) -> None:
    global _store
    _store = store
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _make_shard(shard: int) -> None:
    _store.make(shard)


def _end_with_parent() -> None:
    """End when the parent is gone, which may have been killed: a worker would wait for it for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)
