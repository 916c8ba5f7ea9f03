"""A task: the images of some classes of a data set, divided into train, val and test, decoded and ready."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from refilled.data.grey import GreyRange
from refilled.data.partition import DIGEST, Digests, pixel_digests
from refilled.data.several import NONE, Several
from refilled.data.store import JoinedImages, Pixels, SeenPixels
from refilled.data.transforms import Augmentation

_BLOCK = 256  # images that are brought to memory at a time


@dataclass(frozen=True)
class Split:
    """The images of one part of a task."""

    pixels: Pixels
    """uint8 ``(N, 3, S, S)`` in channels-last memory, or on disk where that is too large."""

    labels: Tensor
    """int64 ``(N,)``, class ids 0 .. C-1; -1 for an image without a label."""

    sources: Sequence[str]
    """Where each image came from: a path within the folder, or ``train.parquet#17``."""

    known_digests: Digests | None = None
    """What :attr:`digests` gives, where it is known already."""

    @property
    def digests(self) -> Digests:
        """Digests of the pixels ``(N,)``; equal digests mean equal pixels."""
        if self.known_digests is not None:
            return self.known_digests
        blocks = [pixel_digests(block.cpu()) for block in self.pixels.split(_BLOCK)]
        return np.concatenate([np.empty(0, dtype=DIGEST), *blocks])

    def __len__(self) -> int:
        return len(self.labels)


class Seen(NamedTuple):
    """The N labelled images that training sees, and after them M without labels."""

    pixels: SeenPixels
    """uint8 ``(N + M, 3, S, S)``."""

    labels: Tensor
    """int64 ``(N + M,)``; -1 for an image without a label."""


@dataclass(frozen=True)
class Task:
    """A classification task with its images."""

    name: str
    """The text form that gives this very task again."""

    classes: tuple[str, ...]
    """Names of the C classes."""

    train: Split
    val: Split
    test: Split
    image_size: int
    """Side length S in pixels."""

    augmentation: Augmentation
    """What suits the source."""

    fingerprint: str
    """SHA-256 over class names, labels and pixels of every part."""

    skipped: tuple[tuple[str, str], ...] = ()
    """(image, reason) of what could not be read and was left out."""

    notes: tuple[str, ...] = ()
    """What a reader of results should know: parts that were cut, copies, classes without images."""

    ignored: Several = NONE
    """Files of a folder that are not used, such as those that are not images."""

    copies: Several = NONE
    """Images that equal an earlier one; copies stay on one side of a cut."""

    left_out: Several = NONE
    """Images that were left out, because they equal held-out images."""

    grey_range: GreyRange | None = None
    """The levels that became black and white in pictures with more than 8 bits a channel; None if there are none."""

    licence: str | None = None
    citation: str | None = None

    unlabelled: Split | None = None
    """Images to learn from without labels; the fingerprint is not about them."""

    unlabelled_fingerprint: str | None = None
    """SHA-256 over their pixels."""

    @property
    def seen(self) -> Seen:
        """The images that training sees: the labelled ones, and after them those without labels."""
        if self.unlabelled is None:
            return Seen(self.train.pixels, self.train.labels)
        pixels = JoinedImages(self.train.pixels, self.unlabelled.pixels)
        labels = torch.cat([self.train.labels, self.unlabelled.labels])
        return Seen(pixels, labels)

    def source_of(self, row: int) -> str:
        """Return the origin of one of the images that training sees."""
        if self.unlabelled is None or row < len(self.train):
            return self.train.sources[row]
        return self.unlabelled.sources[row - len(self.train)]

    @property
    def seen_fingerprint(self) -> str:
        """The fingerprint of the labelled images and of those without labels together."""
        if self.unlabelled_fingerprint is None:
            return self.fingerprint
        return sha256(f"{self.fingerprint}/{self.unlabelled_fingerprint}".encode()).hexdigest()

    def near(self, device: torch.device) -> "Task":
        """Hold the images on an NVIDIA GPU that has room for them, so that it draws their views itself."""
        if device.type != "cuda":
            return self
        room = torch.cuda.mem_get_info(device)[0] // 4

        def nearer(part: Split) -> Split:
            nonlocal room
            size = math.prod(part.pixels.shape)
            if not isinstance(part.pixels, Tensor) or size > room:
                return part
            room -= size
            return replace(part, pixels=part.pixels.to(device))

        train, val, test = nearer(self.train), nearer(self.val), nearer(self.test)
        unlabelled = None if self.unlabelled is None else nearer(self.unlabelled)
        return replace(self, train=train, val=val, test=test, unlabelled=unlabelled)


def fingerprint(classes: tuple[str, ...], splits: tuple[Split, ...]) -> str:
    """Digest class names, labels and pixels: two tasks are the same data if and only if these are equal."""
    digest = sha256(json.dumps(classes).encode())
    for split in splits:
        digest.update(json.dumps(list(split.pixels.shape)).encode())
        digest.update(split.labels.numpy().tobytes())
        for block in split.pixels.split(_BLOCK):
            digest.update(block.permute(0, 2, 3, 1).contiguous().numpy().reshape(-1).data)
    return digest.hexdigest()
