"""A task: decoded images of some classes of a data set, divided into train, val and test."""

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

_BLOCK = 256  # images copied to memory at a time


@dataclass(frozen=True)
class Split:
    """The images of one part of a task."""

    pixels: Pixels
    """uint8 ``(N, 3, S, S)`` in channels-last memory, or on disk if too large for memory."""

    labels: Tensor
    """int64 ``(N,)``, class ids 0 .. C-1; -1 for an image without a label."""

    sources: Sequence[str]
    """Name of each image: its path relative to the folder, or such as ``train.parquet#17``."""

    known_digests: Digests | None = None
    """The value of :attr:`digests`, if it is known."""

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
    """The images used in training: N labelled ones, followed by M without labels."""

    pixels: SeenPixels
    """uint8 ``(N + M, 3, S, S)``."""

    labels: Tensor
    """int64 ``(N + M,)``; -1 for an image without a label."""


@dataclass(frozen=True)
class Task:
    """A classification task with its images."""

    name: str
    """The text that loads the same task again."""

    classes: tuple[str, ...]
    """Names of the C classes."""

    train: Split
    val: Split
    test: Split
    image_size: int
    """Side length S in pixels."""

    augmentation: Augmentation
    """The augmentation that suits the source."""

    fingerprint: str
    """SHA-256 over class names, labels and pixels of every part."""

    skipped: tuple[tuple[str, str], ...] = ()
    """(image, reason) of the images that could not be read and were left out."""

    notes: tuple[str, ...] = ()
    """Facts for the reader of results: parts that were cut, copies, classes without images."""

    ignored: Several = NONE
    """Files of a folder that are not used, such as those that are not images."""

    copies: Several = NONE
    """Images that equal an earlier one; copies stay on one side of a cut."""

    left_out: Several = NONE
    """Images that were left out, because they equal held-out images."""

    grey_range: GreyRange | None = None
    """Black and white of pictures with more than 8 bits per channel; None if there are none."""

    licence: str | None = None
    citation: str | None = None

    unlabelled: Split | None = None
    """Unlabelled training images. :attr:`fingerprint` does not cover them."""

    unlabelled_fingerprint: str | None = None
    """SHA-256 over the pixels of the unlabelled images."""

    @property
    def seen(self) -> Seen:
        """The images used in training: the labelled ones, followed by those without labels."""
        if self.unlabelled is None:
            return Seen(self.train.pixels, self.train.labels)
        pixels = JoinedImages(self.train.pixels, self.unlabelled.pixels)
        labels = torch.cat([self.train.labels, self.unlabelled.labels])
        return Seen(pixels, labels)

    def source_of(self, row: int) -> str:
        """Return the name of an image at a row of :attr:`seen`."""
        if self.unlabelled is None or row < len(self.train):
            return self.train.sources[row]
        return self.unlabelled.sources[row - len(self.train)]

    @property
    def seen_fingerprint(self) -> str:
        """A fingerprint of the labelled and the unlabelled images together."""
        if self.unlabelled_fingerprint is None:
            return self.fingerprint
        return sha256(f"{self.fingerprint}/{self.unlabelled_fingerprint}".encode()).hexdigest()

    def near(self, device: torch.device) -> "Task":
        """Return the task with its images on an NVIDIA GPU, as far as they fit into a quarter of its free memory."""
        if device.type != "cuda":
            return self
        room = torch.cuda.mem_get_info(device)[0] // 4

        def moved(part: Split) -> Split:
            nonlocal room
            size = math.prod(part.pixels.shape)
            if not isinstance(part.pixels, Tensor) or size > room:
                return part
            room -= size
            return replace(part, pixels=part.pixels.to(device))

        train, val, test = moved(self.train), moved(self.val), moved(self.test)
        unlabelled = None if self.unlabelled is None else moved(self.unlabelled)
        return replace(self, train=train, val=val, test=test, unlabelled=unlabelled)


def fingerprint(classes: tuple[str, ...], splits: tuple[Split, ...]) -> str:
    """Return the SHA-256 over class names, labels and pixels. Equal fingerprints mean equal data."""
    digest = sha256(json.dumps(classes).encode())
    for split in splits:
        digest.update(json.dumps(list(split.pixels.shape)).encode())
        digest.update(split.labels.numpy().tobytes())
        for block in split.pixels.split(_BLOCK):
            digest.update(block.permute(0, 2, 3, 1).contiguous().numpy().reshape(-1).data)
    return digest.hexdigest()
