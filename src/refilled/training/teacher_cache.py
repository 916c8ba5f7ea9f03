"""The teacher's embeddings of a fixed set of augmented views, computed once and kept on disk.

A view is a pure function of its number and the image, so the cache holds the teacher's embeddings of
exactly the images that the student sees. Runs with other seeds, methods or students share a cache, because it depends
on none of these.

A cache is a folder of shards, each with one view of a range of the images. A shard is written whole or not at all and
ends in a checksum of its contents and of its owner. A killed build therefore resumes, several processes can build one
cache, and a shard that is torn, or was made for something else, is detected and built again.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from refilled.data import Augmentation, AutoAugment, Task, Views, spread
from refilled.errors import RunError
from refilled.files import write_atomic
from refilled.locks import lock, unlock
from refilled.models import Backbone, refuse_non_finite
from refilled.training.evaluation import nearest_center_accuracy
from refilled.training.progress import Pace

VIEW_SEED = 0  # for the augmentation of cached views; not the run's seed, so that runs can share them
SHARD_IMAGES = 16384
"""Images per shard: half a minute of work for a CPU, and few files for a million images."""

_BATCH = 256
_COMPARED = 256  # images
_CENTERED = 16384  # images for the class means of the comparison
_DIGEST_SIZE = sha256().digest_size
_ITEM_SIZE = np.dtype(np.float32).itemsize

_OFF = {"auto_augment": "none", "color_jitter": 0.0, "random_erasing": 0.0}
"""Values at which fields added later have no effect; they are left out of the key, so old caches stay valid."""

Embed = Callable[[Tensor], Tensor]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Contents:
    """Description of a cache. Every field determines the embeddings or their place in the files."""

    teacher: str
    data: str
    images: int
    embedding_dim: int
    views: int
    augmentation: Augmentation
    precision: str
    shard_images: int = SHARD_IMAGES
    mixup: float = 0.0
    cutmix: float = 0.0
    schema: int = 3
    auto_augment: AutoAugment = "none"
    color_jitter: float = 0.0
    random_erasing: float = 0.0

    @property
    def key(self) -> str:
        """A short name of the folder."""
        parts = {name: value for name, value in asdict(self).items() if name not in _OFF or value != _OFF[name]}
        return sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def each_view(self) -> Views:
        """How each view is drawn."""
        return Views(**{field.name: getattr(self, field.name) for field in fields(Views)})

    @property
    def shards_a_view(self) -> int:
        """Number of shards per view of all images."""
        return -(-self.images // self.shard_images)

    @property
    def shards(self) -> int:
        """Number of shards. They are numbered from 0, those of the first view first."""
        return self.views * self.shards_a_view

    def part(self, shard: int) -> tuple[int, range]:
        """Return the view and the range of images in a shard."""
        view, place = divmod(shard, self.shards_a_view)
        start = place * self.shard_images
        return view, range(start, min(start + self.shard_images, self.images))


@dataclass(frozen=True)
class _Manifest:
    contents: Contents
    teacher: str
    task: str


@dataclass(frozen=True)
class Gap:
    """Difference between a cache and the live teacher, on some of the training images and all views in turn."""

    images: int
    largest_difference: float
    """Of two numbers of an embedding, in units of the root mean square of the live ones."""
    live_accuracy: float
    """Percent of the images, as the live teacher embeds them, that are nearest to the mean of their own class."""
    cached_accuracy: float
    """The same for the embeddings in the cache."""


def fingerprint(model: Backbone) -> str:
    """Identify a model by its weights, its normalisation and its kind of embedding, as 16 hexadecimal digits."""
    digest = sha256(repr((model.input_size, model.mean.flatten().tolist(), model.std.flatten().tolist())).encode())
    if model.pooling != "pooled":
        digest.update(model.pooling.encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class TeacherCache:
    """Embeddings ``(V, N, d)`` of V views of the N training images, memory-mapped, float32.

    Args:
        folder: The folder of the shards.
        contents: The description of the cache.
        of: The names of teacher and task, for display only; they do not identify a cache.
    """

    def __init__(self, folder: Path, contents: Contents, of: tuple[str, str] = ("", "")) -> None:
        self.folder, self.contents, self.of = folder, contents, of
        self._mapped: dict[int, NDArray[np.float32]] = {}

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open the cache in a folder as its manifest describes it.

        Raises:
            RunError: There is none, or its manifest is damaged.
        """
        try:
            manifest = TypeAdapter(_Manifest).validate_json((folder / "manifest.json").read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"].lower()
            raise RunError(
                f"{folder} holds no readable teacher cache: manifest.json: {reason}; a run or 'refilled cache build' "
                "that needs it repairs it"
            ) from error
        return cls(folder, manifest.contents, (manifest.teacher, manifest.task))

    @property
    def size(self) -> int:
        """Size of the whole cache in bytes."""
        return sum(self._size(shard) for shard in range(self.contents.shards))

    def shards_on_disk(self) -> int:
        """Return the number of shards that exist; their content is not checked."""
        return sum(self.path(shard).exists() for shard in range(self.contents.shards))

    def __call__(self, view: int, indices: Tensor) -> Tensor:
        """Return the embeddings ``(B, d)`` of one view of the training images with these indices ``(B,)``."""
        contents = self.contents
        places, rows = np.divmod(indices.numpy(), contents.shard_images)
        embeddings = np.empty((len(rows), contents.embedding_dim), dtype=np.float32)
        for place in np.unique(places):
            here = places == place
            embeddings[here] = self._map(view * contents.shards_a_view + int(place))[rows[here]]
        return torch.from_numpy(embeddings)

    def problems(self) -> dict[int, str]:
        """Check all shards, and return why each unusable one cannot be used."""
        found = ((shard, self.problem(shard)) for shard in range(self.contents.shards))
        return {shard: problem for shard, problem in found if problem is not None}

    def problem(self, shard: int) -> str | None:
        """Check a shard, and return why it cannot be used; None if it can."""
        path = self.path(shard)
        if not path.exists():
            return "missing"
        if not path.is_file():
            return "not a file"
        size = path.stat().st_size
        if size != self._size(shard):
            return f"torn: {size:,} bytes, not {self._size(shard):,}"
        content = np.memmap(path, dtype=np.uint8, mode="r")
        if self._digest(shard, content[:-_DIGEST_SIZE]) != content[-_DIGEST_SIZE:].tobytes():
            return "damaged, or made for another teacher, task or view: its checksum does not match"
        return None

    def build(
        self, task: Task, embed: Embed, shards: Iterable[int] | None = None, say: Say = lambda text: None
    ) -> None:
        """Build those of these shards, or of all, that are missing or damaged; whole ones do not change.

        Any number of processes may call this at once. Each builds shards that no other process is building. Then it
        waits for the rest, and builds a shard itself if the process that was building it died.

        Args:
            task: The task; views of its training images are embedded.
            embed: The teacher's embedding ``(B, d)`` of images ``(B, 3, S, S)``.
            shards: Numbers of shards.
            say: Called with a message for every shard that is built, with the reason, and every ten seconds with the
                number of images that are embedded, their rate and the time left.

        Raises:
            RunError: The disk is full, or writing is not permitted.
        """
        self._write_manifest()
        wanted = range(self.contents.shards) if shards is None else shards
        pending = [shard for shard in wanted if self.problem(shard)]
        pace = Pace("teacher cache", sum(len(self.contents.part(shard)[1]) for shard in pending), say)
        with (self.folder / ".shards").open("w") as claims:
            for wait in (False, True):  # first the free shards, then those of other processes
                pending = [shard for shard in pending if not self._make(shard, task, embed, claims, wait, say, pace)]

    def gap(self, task: Task, embed: Embed) -> Gap:
        """Compare the cache with the live teacher, on labelled images spread evenly.

        Both embeddings are classified by the same class means, those of the first view in the cache.
        """
        compared, views = spread(len(task.train), _COMPARED), self.contents.views
        turns = [(view, compared[view::views]) for view in range(min(views, len(compared)))]
        live = torch.cat([self._embed(task, embed, view, indices) for view, indices in turns])
        cached = torch.cat([self(view, indices) for view, indices in turns])
        labels = task.train.labels[torch.cat([indices for _, indices in turns])]
        some = spread(len(task.train), _CENTERED)
        centers = self(0, some), task.train.labels[some]
        return Gap(
            images=len(compared),
            largest_difference=((live - cached).abs().max() / live.square().mean().sqrt().clamp_min(1e-12)).item(),
            live_accuracy=nearest_center_accuracy(*centers, live, labels),
            cached_accuracy=nearest_center_accuracy(*centers, cached, labels),
        )

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        view, images = self.contents.part(shard)
        return self.folder / f"view-{view:04d}-images-{images.start:08d}.f32"

    def _make(self, shard: int, task: Task, embed: Embed, claims: IO[str], wait: bool, say: Say, pace: Pace) -> bool:
        """Build a shard unless another process has; False if another process holds its lock and ``wait`` is False."""
        # One byte of the file stands for each shard. The system unlocks a byte when the process ends.
        if not lock(claims, shard, wait=wait):
            return False
        try:
            problem = self.problem(shard)
            if problem is not None:
                say(f"teacher cache: shard {shard + 1} of {self.contents.shards} is {problem}; embedding its images")
                self._write_shard(shard, task, embed, pace)
            else:
                pace.leave_out(len(self.contents.part(shard)[1]))
        finally:
            unlock(claims, shard)
        return True

    def _write_shard(self, shard: int, task: Task, embed: Embed, pace: Pace) -> None:
        view, images = self.contents.part(shard)
        batches = torch.arange(images.start, images.stop).split(_BATCH)
        parts = []
        for indices in batches:
            parts.append(self._embed(task, embed, view, indices))
            pace(len(indices))
        body = torch.cat(parts).numpy()
        for left_behind in self.folder.glob(f".{self.path(shard).name}.*.tmp"):
            left_behind.unlink(missing_ok=True)
        self._write(self.path(shard), body.tobytes() + self._digest(shard, body))
        self._mapped.pop(shard, None)

    def _embed(self, task: Task, embed: Embed, view: int, indices: Tensor) -> Tensor:
        pixels = self.contents.each_view.load(task.seen.pixels, indices, seed=VIEW_SEED, view=view)
        embedding = embed(pixels).float().cpu()
        refuse_non_finite(embedding, [task.source_of(row) for row in indices.tolist()])
        return embedding

    def _write_manifest(self) -> None:
        teacher, task = self.of
        manifest = {"contents": asdict(self.contents), "teacher": teacher, "task": task}
        self._write(self.folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())

    def _write(self, path: Path, data: bytes) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)
        except OSError as error:
            raise RunError(
                f"{path} cannot be written: {error.strerror}. The cache needs {self.size / 2**20:,.1f} MB; make room, "
                "or name another folder in REFILLED_CACHE"
            ) from error

    def _map(self, shard: int) -> NDArray[np.float32]:
        if shard not in self._mapped:
            shape = (len(self.contents.part(shard)[1]), self.contents.embedding_dim)
            self._mapped[shard] = np.memmap(self.path(shard), dtype=np.float32, mode="r", shape=shape)
        return self._mapped[shard]

    def _size(self, shard: int) -> int:
        return len(self.contents.part(shard)[1]) * self.contents.embedding_dim * _ITEM_SIZE + _DIGEST_SIZE

    def _digest(self, shard: int, body: NDArray[Any]) -> bytes:
        digest = sha256(f"{self.contents.key}/{shard}".encode())
        digest.update(body.data)
        return digest.digest()


def teacher_cache(
    root: Path,
    teacher: Backbone,
    task: Task,
    *,
    number: int,
    views: Views,
    precision: str,
    names: tuple[str, str] = ("", ""),
) -> TeacherCache:
    """Return the cache of a teacher and a task under ``root``, even if none of it is built yet.

    Args:
        root: Folder of all caches.
        teacher: The teacher.
        task: The task; its training images, labelled or not, are embedded.
        number: Number of views per image.
        views: How a view is drawn.
        precision: Precision of the teacher's computation.
        names: The names of the teacher and the task, for display only.
    """
    contents = Contents(
        teacher=fingerprint(teacher),
        data=task.seen_fingerprint,
        images=len(task.seen.labels),
        embedding_dim=teacher.embedding_dim,
        views=number,
        precision=precision,
        **asdict(views),
    )
    return TeacherCache(root / contents.key, contents, names)
