"""Image files, decoded batch by batch ahead of whoever uses them. Memory does not grow with their number."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from refilled.data.decode import read_pixels
from refilled.data.grey import GreyRange


class DecodedBatch(NamedTuple):
    """The readable images of a batch, and what could not be read."""

    images: list[Path]
    pixels: Tensor
    """uint8 ``(N, 3, S, S)``, one per image."""
    unreadable: list[tuple[Path, str]]
    """Images that could not be read, and why."""


def decode_ahead(
    images: Iterable[Path], size: int, grey: GreyRange | None = None, batch_size: int = 64
) -> Iterator[DecodedBatch]:
    """Decode image files in batches, each while the caller works on the one before.

    At most three batches are in memory: the one that is being decoded, the one that is given, and the one that the
    caller may still hold. ``images`` is drawn from in another thread, a batch at a time; what it raises arrives in its
    place, after the batches before.

    Args:
        images: The files, at most some of which need be known at the beginning.
        size: Side length S of the images.
        grey: Black and white of pictures with more than 8 bits per channel; None to refuse those.
        batch_size: Files per batch.

    Raises:
        TaskError: There is no room for a batch in memory.
    """
    remaining = iter(images)

    def decode_next() -> DecodedBatch | None:
        batch = list(islice(remaining, batch_size))
        if not batch:
            return None
        pixels, reasons = read_pixels(batch, len(batch), size, grey)
        readable = [path for position, path in enumerate(batch) if position not in reasons]
        return DecodedBatch(readable, pixels, [(batch[position], reason) for position, reason in reasons.items()])

    with ThreadPoolExecutor(1, thread_name_prefix="decode-ahead") as thread:
        upcoming: Future[DecodedBatch | None] = thread.submit(decode_next)
        while True:
            decoded = upcoming.result()
            if decoded is None:
                return
            upcoming = thread.submit(decode_next)
            yield decoded
            del decoded  # so that it is not held while the next one is awaited
