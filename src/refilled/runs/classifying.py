"""The class of image files, batch by batch: rows are there as soon as they are computed, and none is kept."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from refilled.data import GreyRange
from refilled.data.streaming import decode_ahead
from refilled.data.walking import walk_images
from refilled.errors import TaskError

BATCH = 64
"""Images at a time: rows appear soon, and the forward pass of a batch stays in the nearer caches."""


class Predicted(NamedTuple):
    """What is said of a batch of image files."""

    images: list[Path]
    """The readable ones, N."""
    probabilities: Tensor
    """float32 ``(N, C)``, on the CPU."""
    unreadable: list[tuple[Path, str]]
    """Images that could not be read, and why."""


@dataclass(frozen=True)
class Classifier:
    """A function from images to logits, and what it must be given."""

    logits: Callable[[Tensor], Tensor]
    """From uint8 ``(N, 3, S, S)`` to ``(N, C)`` on the CPU."""
    classes: tuple[str, ...]
    """Their C names."""
    image_size: int
    """Side length S of the images."""
    grey: GreyRange | None
    """Black and white of pictures with more than 8 bits per channel; None to refuse those."""

    def stream(self, images: Iterable[Path], batch_size: int = BATCH) -> Iterator[Predicted]:
        """Classify image files batch by batch. Folders are walked, and the next files decoded, in the meantime.

        Memory holds three batches of images, whatever their number.

        Args:
            images: Image files, or folders whose images, at any depth, are taken in the order of their names.
            batch_size: Files per batch.

        Raises:
            TaskError: There is no image, or a folder cannot be listed; the batches before it are given first.
        """
        empty = True
        for decoded in decode_ahead(named_images(images), self.image_size, self.grey, batch_size):
            empty = False
            logits = self.logits(decoded.pixels) if decoded.images else decoded.pixels.new_empty(0, len(self.classes))
            yield Predicted(decoded.images, logits.float().softmax(1), decoded.unreadable)
        if empty:
            raise TaskError("no images were found; name image files, or folders that hold some")


def named_images(paths: Iterable[Path]) -> Iterator[Path]:
    """Return the image files that paths name: those of a folder, at any depth, or the file itself.

    Folders are walked as the files are asked for.

    Raises:
        TaskError: One is the address of a download (at once), or a folder cannot be listed (in its place).
    """
    paths = list(paths)
    for path in paths:
        if re.match(r"[a-z]+:/|-$", str(path)) and not path.is_dir():
            raise TaskError(f"{path} is not a file; download what it names, and give the file or its folder")
    return chain.from_iterable(walk_images(path) if path.is_dir() else [path] for path in paths)
