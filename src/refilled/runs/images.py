"""The record of a run's images in its folder, to recognise training images when a student is scored later.

``data.json`` describes the task: its text, its fingerprint and the state of its files. ``images.safetensors`` holds a
digest of 8 bytes per image, computed from the pixels as the student sees them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from refilled.data import Split, Task
from refilled.errors import RunError
from refilled.files import damaged, read_json_object, read_tensors, require, write_atomic
from refilled.words import plural

_SHOWN = 3  # names of images in a message


@dataclass(frozen=True)
class ImageRecord:
    """The images of a run.

    Attributes:
        task: The text of the task, with absolute paths.
        fingerprint: Fingerprint of the task.
        stamp: State of the task's files when they were last read; see :func:`~refilled.data.task_stamp`.
        image_size: Side length of the images in pixels.
        digests: By split, the digest of each image, int64 ``(N,)``.
    """

    task: str
    fingerprint: str
    stamp: str
    image_size: int
    digests: Mapping[str, Tensor]

    @classmethod
    def of(cls, task: Task, stamp: str) -> Self:
        """Record the images of a task."""
        digests = {name: image_digests(part) for name, part in _parts_of(task).items()}
        return cls(task.name, task.seen_fingerprint, stamp, task.image_size, digests)

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read the record from a run's folder; None if there is none yet.

        Raises:
            RunError: It is damaged.
        """
        if not (folder / "data.json").exists():
            return None
        path = folder / "data.json"
        about, digests = read_json_object(path), read_tensors(folder / "images.safetensors")
        require(path, about, task=str, fingerprint=str, stamp=str, image_size=int)
        if "train" not in digests:
            raise RunError(damaged(folder / "images.safetensors", "it holds no digests of training images"))
        return cls(**{name: about[name] for name in ("task", "fingerprint", "stamp", "image_size")}, digests=digests)

    def save(self, folder: Path) -> None:
        """Write the record to a run's folder. ``data.json`` is last, so the record is complete if it exists."""
        about = {name: value for name, value in vars(self).items() if name != "digests"}
        write_atomic(folder / "images.safetensors", save(dict(self.digests)))
        write_atomic(folder / "data.json", (json.dumps(about, indent=2) + "\n").encode())

    def changes(self, task: Task) -> str | None:
        """Return a phrase that describes how the task's images differ from the record; None if they do not."""
        if task.seen_fingerprint == self.fingerprint:
            return None
        changed = [
            phrase
            for name, part in _parts_of(task).items()
            if name in self.digests
            for phrase in _changes_of(name, self.digests[name], part)
        ]
        return ", ".join(changed) or "their order or the names of the classes changed"

    def trained_on(self, images: Split) -> int:
        """Return how many of the images the student was trained on. Their names do not matter."""
        return int(torch.isin(image_digests(images), self.digests["train"]).sum())


def _parts_of(task: Task) -> dict[str, Split]:
    parts = {"train": task.train, "val": task.val, "test": task.test}
    return parts if task.unlabelled is None else {**parts, "unlabelled": task.unlabelled}


def image_digests(images: Split) -> Tensor:
    """Return the digest of each image, int64 ``(N,)``. Equal pixels have equal digests."""
    digests = np.ascontiguousarray(images.digests).view(np.int64).reshape(-1, 2)
    return torch.from_numpy(digests[:, 0].copy())


def _changes_of(name: str, before: Tensor, part: Split) -> list[str]:
    now = image_digests(part)
    new = (~torch.isin(now, before)).nonzero().flatten().tolist()
    gone = int((~torch.isin(before, now)).sum())
    shown = ", ".join(part.sources[row] for row in new[:_SHOWN])
    more = ", ..." if len(new) > _SHOWN else ""
    added = [f"{len(new)} of {name} {plural(len(new), 'is', 'are')} new ({shown}{more})"] if new else []
    return [*added, *([f"{gone} of {name} {plural(gone, 'is', 'are')} gone"] if gone else [])]
