"""Made-up pictures, for tests in which it does not matter what a picture shows."""

import colorsys
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def picture(
    seed: int | Sequence[int], size: int | tuple[int, int] = 16, tint: tuple[float, float, float] | None = None
) -> Image.Image:
    """Return noise: uniform over all levels, or normal around a colour, the ``tint``.

    ``size`` is the side of a square or ``(width, height)``. Equal arguments give equal pixels.
    """
    chance = np.random.default_rng(seed)
    width, height = (size, size) if isinstance(size, int) else size
    if tint is None:
        return Image.fromarray(chance.integers(0, 256, (height, width, 3), dtype=np.uint8))
    levels = np.asarray(tint) + chance.normal(0, 50, (height, width, 3))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def tint_of(number: int) -> tuple[float, float, float]:
    """Return a colour for a class; those of few classes are far from each other."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618 % 1, 0.8, 0.8)  # steps of the golden ratio
    return 255 * red, 255 * green, 255 * blue


def numbered(number: int, size: int | tuple[int, int] = 8) -> Image.Image:
    """Return a picture of one colour, whose red and green hold the number; equal numbers give equal pixels."""
    both = (size, size) if isinstance(size, int) else size
    return Image.new("RGB", both, (number % 256, number // 256, 7))


def png(image: Image.Image) -> bytes:
    """Return the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def put(path: Path, image: Image.Image) -> None:
    """Write a picture, in the format of its suffix; the folders above it are made if they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def folder(
    root: Path,
    classes: Mapping[str, int],
    *,
    size: int | tuple[int, int] = 16,
    tinted: bool = False,
    seed: int = 0,
    suffix: str = "png",
) -> Path:
    """Write a folder for each class, with this many different pictures ``00.png``, ``01.png``, …; return ``root``.

    The classes differ in colour if they are ``tinted``, and in nothing otherwise. No picture equals one of another
    ``seed``, nor a :func:`picture` of a single number.
    """
    for place, (name, count) in enumerate(classes.items()):
        for number in range(count):
            tint = tint_of(place) if tinted else None
            own = (seed, place, number, 1)  # numpy ignores zeros at the end, so that (0, 0, 0) would be the seed 0
            put(root / name / f"{number:02}.{suffix}", picture(own, size, tint))
    return root
