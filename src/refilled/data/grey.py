"""Pictures with more than 8 bits per channel: which of their levels are black and white.

Files of 16 or 32 bits rarely use all of them. Cameras and scanners give 10, 12 or 14 bits, or 8 in a wider file, and
floats may have any scale. Black and white are a property of the data set: they are determined once, from the training
images, and are the same for every image, so that a dark image stays dark.
"""

import re
from collections.abc import Iterable
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FORMATS_SCALED_BY_PILLOW = ("PPM", "JPEG2000")  # their files contain the range, which Pillow scales to 16 bits

DEEP = "more than 8 bits"
NO_RANGE = (
    f"{DEEP} per channel, but no training image has, so its black and white are unknown; save it with 8 bits per "
    "channel"
)
"""The reason to leave out a picture with more than 8 bits per channel where the range of levels is not known."""

_BITS = (8, 10, 12, 14, 16)  # usual bit depths of sensors
_ROWS = 64  # of a picture, scaled at a time
Arguments = tuple[Any, ...] | str | None
"""Arguments of a decoder of Pillow: the name of a raw mode, or a tuple that begins with it."""

_DEEP_COLOUR = re.compile(r"(RGB|RGBA|RGBX|LA);16[BLN]")


class GreyRange(NamedTuple):
    """The levels that become black (0) and white (255)."""

    black: float
    white: float

    @classmethod
    def of_bits(cls, bits: int) -> "GreyRange":
        """Return the range of unsigned integers with this many bits."""
        return cls(0, 2**bits - 1)

    @property
    def bits(self) -> int | None:
        """The number of bits whose range this is, or None."""
        bits = round(self.white).bit_length()
        return bits if 8 <= bits <= 16 and self == self.of_bits(bits) else None

    def __str__(self) -> str:
        bits = "" if self.bits is None else f" ({self.bits} bits)"
        return f"{self.black:g} to {self.white:g}{bits}"


FULL = GreyRange.of_bits(16)


class Extremes(NamedTuple):
    """The lowest and highest level of a picture."""

    lowest: float
    highest: float
    whole: bool
    """Whether all levels are whole numbers in an integer type, or whole and above 1 in a float type."""


def extremes(levels: NDArray[np.generic]) -> Extremes:
    """Return the extremes of the levels of one picture.

    Raises:
        ValueError: Some levels are not finite.
    """
    lowest, highest = float(levels.min()), float(levels.max())
    if not np.isfinite((lowest, highest)).all():
        raise ValueError("some of its pixels are not finite numbers")
    if np.issubdtype(levels.dtype, np.integer):
        return Extremes(lowest, highest, whole=True)
    return Extremes(lowest, highest, whole=highest > 1 and bool((levels == np.floor(levels)).all()))


def range_of(levels: Iterable[Extremes]) -> GreyRange | None:
    """Return black and white for the extremes of all training images; None if there are no images.

    Whole numbers from 0 to 65535: the smallest of 8, 10, 12, 14 and 16 bits that holds all of them. Fractions: [0, 1]
    or [0, 255], whichever is the first to hold all of them. Otherwise: the lowest and the highest level.
    """
    images = list(levels)
    if not images:
        return None
    lowest, highest = min(image.lowest for image in images), max(image.highest for image in images)
    whole = any(image.whole for image in images) and all(image.whole or image.highest <= 1 for image in images)
    if lowest >= 0 and whole and highest <= FULL.white:
        return next(of_bits for of_bits in map(GreyRange.of_bits, _BITS) if highest <= of_bits.white)
    if lowest >= 0 and not whole and highest <= 1:
        return GreyRange(0, 1)
    if lowest >= 0 and not whole and highest <= 255:
        return GreyRange(0, 255)
    return GreyRange(lowest, max(highest, lowest + 1e-6))


def to_bytes(levels: NDArray[np.generic], scale: GreyRange) -> NDArray[np.uint8]:
    """Scale levels so that black becomes 0 and white becomes 255.

    Levels outside a range of bits are an error, since they belong to another kind of data. Levels outside a measured
    range are clipped, up to a distance of the width of the range.

    Raises:
        ValueError: Levels are too far outside the range.
    """
    lowest, highest, _ = extremes(levels)
    width = scale.white - scale.black
    slack = 0 if scale.bits is not None else width
    if lowest < scale.black - slack or highest > scale.white + slack:
        raise ValueError(
            f"its levels range from {lowest:g} to {highest:g}, but those of the training images from {scale}"
        )
    scaled = np.empty(levels.shape, dtype=np.uint8)
    for start in range(0, len(levels), _ROWS):  # the wider numbers of a whole photograph would fill the memory
        rows = slice(start, start + _ROWS)
        if np.issubdtype(levels.dtype, np.integer) and scale.bits is not None:
            scaled[rows] = levels[rows].astype(np.int64) * 255 // int(scale.white)
        else:
            shares = (levels[rows].astype(np.float64) - scale.black) / width
            scaled[rows] = np.rint(shares.clip(0, 1) * 255)
    return scaled


def is_deep(image: Image.Image) -> bool:
    """Return whether a picture has more than 8 bits per channel, from the header alone."""
    return image.mode.startswith(("I", "F")) or _raw_mode(image) is not None


def levels_of(image: Image.Image, file: IO[bytes]) -> tuple[NDArray[np.generic], NDArray[np.uint8] | None]:
    """Return the levels of a picture with more than 8 bits per channel.

    Of colours with 16 bits, Pillow keeps the upper 8. The lower 8 are read in a second pass with exchanged bytes. For
    grey with transparency, Pillow does not support this, and the upper 8 bits are used alone.

    Args:
        image: The picture, not loaded yet.
        file: The file of the picture.

    Returns:
        Levels ``(H, W)`` or ``(H, W, 3)``; and opacity ``(H, W)``, or None if the picture has none.
    """
    raw = _raw_mode(image)
    if raw is None:
        return np.asarray(image), None
    upper = np.asarray(image)
    opacity = upper[..., 3] if raw.startswith(("RGBA", "LA")) else None
    colours = upper[..., :3].astype(np.uint16)
    if raw.startswith("LA"):
        return colours * 257, opacity
    file.seek(0)
    with Image.open(file, formats=[image.format or ""]) as again:
        tiles = [tile._replace(args=_exchanged(tile.args)) for tile in again.tile]
        again.tile = tiles
        lower = np.asarray(again)[..., :3]
    return colours * 256 + lower, opacity


def _raw_mode(image: Image.Image) -> str | None:
    """Return the raw mode of a picture whose colours have 16 bits in its file; None for every other picture."""
    tiles = getattr(image, "tile", [])
    raw = _first(tiles[0].args) if tiles else None
    return raw if isinstance(raw, str) and _DEEP_COLOUR.fullmatch(raw) else None


def _first(arguments: Arguments) -> Any:
    return arguments[0] if isinstance(arguments, tuple) and arguments else arguments


def _exchanged(arguments: Arguments) -> Arguments:
    raw = str(_first(arguments))
    raw = raw[:-1] + {"B": "L", "L": "B", "N": "B"}[raw[-1]]  # native order is little-endian
    return (raw, *arguments[1:]) if isinstance(arguments, tuple) else raw
