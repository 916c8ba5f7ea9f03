"""The teacher's embeddings of a fixed set of augmented views, computed once and kept on disk.

A view is a pure function of its number and the image, so what lies in the cache is what the teacher would say about
the very images that the student sees. Runs with other seeds, methods or students share a cache, since neither is part
of what it holds.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refilled.data import Task, augment
from refilled.files import alone, write_atomic
from refilled.models import Backbone

VIEW_SEED = 0  # of the augmentation of cached views: not the run's, so that runs can share them
_BATCH = 256


@dataclass(frozen=True)
class Contents:
    """What a cache holds; every part of it decides the embeddings."""

    teacher: str
    data: str
    images: int
    embedding_dim: int
    views: int
    augmentation: str
    precision: str
    schema: int = 1

    @property
    def key(self) -> str:
        """A short name for the folder."""
        return sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


def fingerprint(model: Backbone) -> str:
    """Identify a model by its weights and its normalisation, as 16 hexadecimal digits."""
    digest = sha256(repr((model.input_size, model.mean.flatten().tolist(), model.std.flatten().tolist())).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class TeacherCache:
    """Embeddings ``(V, N, d)`` of V views of the N training images, memory-mapped."""

    def __init__(self, embeddings: np.ndarray[Any, Any]) -> None:
        self._embeddings = embeddings

    @property
    def views(self) -> int:
        """How many views of each image it holds."""
        return int(self._embeddings.shape[0])

    def __call__(self, view: int, indices: Tensor) -> Tensor:
        """Return the embeddings ``(B, d)`` of one view of the training images with these indices ``(B,)``."""
        return torch.from_numpy(self._embeddings[view % self.views][indices.numpy()])


def teacher_cache(
    root: Path,
    teacher: Backbone,
    task: Task,
    *,
    views: int,
    augmentation: str,
    precision: str,
    embed: Callable[[Tensor], Tensor],
    say: Callable[[str], None] = lambda message: None,
) -> TeacherCache:
    """Open the cache of these contents under ``root``, or make it; of several processes one makes it.

    Args:
        root: Folder of all caches.
        teacher: The teacher.
        task: The task; its training images are embedded.
        views: How many views of each image.
        augmentation: Kind of augmentation.
        precision: What ``embed`` computes in.
        embed: The teacher's embedding of images ``(B, 3, S, S)``.
        say: Told when a cache is made.
    """
    contents = Contents(
        teacher=fingerprint(teacher),
        data=task.fingerprint,
        images=len(task.train),
        embedding_dim=teacher.embedding_dim,
        views=views,
        augmentation=augmentation,
        precision=precision,
    )
    folder = root / contents.key
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        if not _whole(folder, contents):
            say(f"embedding {views} views of {len(task.train)} images by the teacher, once for all runs: {folder}")
            _make(folder, contents, task, embed)
        return TeacherCache(np.load(folder / "embeddings.npy", mmap_mode="r"))


def _make(folder: Path, contents: Contents, task: Task, embed: Callable[[Tensor], Tensor]) -> None:
    (folder / "manifest.json").unlink(missing_ok=True)
    shape = (contents.views, contents.images, contents.embedding_dim)
    # Written straight into the file: the manifest, written last, says that all of it is there.
    target = np.lib.format.open_memmap(folder / "embeddings.npy", mode="w+", dtype=np.float32, shape=shape)
    for view in range(contents.views):
        for indices in torch.arange(contents.images).split(_BATCH):
            pixels = task.train.pixels[indices]
            images = augment(pixels, indices, seed=VIEW_SEED, view=view, kind=contents.augmentation)  # type: ignore[arg-type]
            target[view, indices.numpy()] = embed(images).float().cpu().numpy()
    target.flush()
    manifest = {**asdict(contents), "sha256": _digest(folder / "embeddings.npy")}
    write_atomic(folder / "manifest.json", json.dumps(manifest, indent=2).encode())


def _whole(folder: Path, contents: Contents) -> bool:
    """Whether the folder holds just these contents, undamaged; whatever is stale or torn is made anew."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        digest = manifest.pop("sha256")
        return bool(manifest == asdict(contents) and digest == _digest(folder / "embeddings.npy"))
    except (OSError, ValueError, KeyError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
