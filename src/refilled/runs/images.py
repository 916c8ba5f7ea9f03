"""The record of a run's images in its folder, by which images that were trained on are recognised when scored.

``data.json`` says what the task was: its text, its fingerprint, the state of its files. ``images.safetensors`` holds 8
bytes per image, a digest of its pixels as the student sees them, so that single images are recognised later.
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

_SHOWN = 3  # names of images in a message


@dataclass(frozen=True)
class ImageRecord:
    """The images of a run.

    Attributes:
        task: The text of the task, with absolute paths.
        fingerprint: That of the task.
        stamp: What the files of the task were when they were last seen; see :func:`~refilled.data.task_stamp`.
        image_size: Side length in pixels that was settled.
        digests: For each part, a digest of each image ``(N,)``, int64.
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
        """Read the record in a run's folder; None where the run has none yet."""
        if not (folder / "data.json").exists():
            return None
        path = folder / "data.json"
        about, digests = read_json_object(path), read_tensors(folder / "images.safetensors")
        require(path, about, task=str, fingerprint=str, stamp=str, image_size=int)
        if "train" not in digests:
            raise RunError(damaged(folder / "images.safetensors", "it holds no digests of training images"))
        return cls(**{name: about[name] for name in ("task", "fingerprint", "stamp", "image_size")}, digests=digests)

    def save(self, folder: Path) -> None:
        """Write the record to a run's folder; ``data.json`` last, so that it is whole where it exists."""
        about = {name: value for name, value in vars(self).items() if name != "digests"}
        write_atomic(folder / "images.safetensors", save(dict(self.digests)))
        write_atomic(folder / "data.json", (json.dumps(about, indent=2) + "\n").encode())

    def changes(self, task: Task) -> str | None:
        """Return what has changed since, as a phrase; None if the images are the same."""
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
        """Return how many of some images the student was trained on, whatever they are called now."""
        return int(torch.isin(image_digests(images), self.digests["train"]).sum())


def _parts_of(task: Task) -> dict[str, Split]:
    parts = {"train": task.train, "val": task.val, "test": task.test}
    return parts if task.unlabelled is None else {**parts, "unlabelled": task.unlabelled}


def image_digests(images: Split) -> Tensor:
    """Return a digest of each image ``(N,)``, int64: equal pixels have equal digests."""
    digests = np.ascontiguousarray(images.digests).view(np.int64).reshape(-1, 2)
    return torch.from_numpy(digests[:, 0].copy())


def _changes_of(name: str, before: Tensor, part: Split) -> list[str]:
    now = image_digests(part)
    new = (~torch.isin(now, before)).nonzero().flatten().tolist()
    gone = int((~torch.isin(before, now)).sum())
    shown = ", ".join(part.sources[row] for row in new[:_SHOWN])
    more = ", ..." if len(new) > _SHOWN else ""
    added = [f"{len(new)} of {name} are new ({shown}{more})"] if new else []
    return [*added, *([f"{gone} of {name} are gone"] if gone else [])]
