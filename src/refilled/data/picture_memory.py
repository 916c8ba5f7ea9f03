"""How much memory decoding a picture takes, from its header, and scaling large ones without a second copy."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import ceil, floor
from threading import Condition
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from refilled.errors import RunError

MAX_MEGAPIXELS = "REFILLED_MAX_MEGAPIXELS"
"""Variable of the environment that raises the limit on the pixels of a picture, in millions."""

_MAX_BYTES = 196_000_000  # for decoding one picture: 48 million pixels in a PNG with colours
_MAX_PIXELS = 80_000_000  # whatever they take
_CAMERA_PIXELS = 50_000_000  # whatever they take, too: what cameras and telephones write, one at a time in memory
_MAX_JPEG_PIXELS = 800_000_000  # of the file: it is decoded at a fraction of its size
_SMALL_BYTES = 4_000_000  # for a picture that need not wait
_LARGE_PIXELS = 4_000_000  # of a picture that is scaled in bands
_BAND = 1_000_000  # pixels converted at a time
_ORIENTATION = 0x0112  # the tag of EXIF

# Bytes per pixel. Pillow keeps colours in 4. The rest are the decoders' own copies: peaks of resident memory, measured
# on pictures of 3000x3000 (Pillow 13.0).
_BY_DECODER = {"WEBP": 16, "JPEG2000": 20, "AVIF": 12, "HEIF": 12}
_PROGRESSIVE_JPEG = 3  # coefficients of the whole file, also if it is decoded at a fraction of its size
_ONE_STRIP = 3  # of a TIFF, which may be as large as the picture
_BY_MODE = {"1": 1, "L": 1, "P": 1, "RGB": 4}
_CONVERTED = 6  # other modes: 4, and the bands that are converted to RGB


class TooLarge(Exception):
    """Decoding a picture would take too much memory."""


def bytes_per_pixel(image: Image.Image) -> int:
    """Return about how many bytes per pixel decoding a picture takes, of which only the header has been read."""
    if image.format in _BY_DECODER:
        return _BY_DECODER[image.format]
    if image.mode.startswith("I;16"):
        return 8  # with the levels as an array, and its bytes
    return _BY_MODE.get(image.mode, _CONVERTED) + (_ONE_STRIP if image.format == "TIFF" else 0)


def refuse_large_file(image: Image.Image) -> None:
    """Refuse a JPEG that takes too much memory at any fraction of its size; for use before ``draft``.

    Raises:
        TooLarge: It has too many pixels.
    """
    if image.format == "JPEG":
        progressive = "progressive" in image.info
        _refuse(image, _MAX_BYTES // _PROGRESSIVE_JPEG if progressive else _MAX_JPEG_PIXELS)


def refuse_large(image: Image.Image) -> None:
    """Refuse a picture that takes too much memory at the size at which it will be decoded.

    Raises:
        TooLarge: It has too many pixels.
    """
    _refuse(image, min(_MAX_PIXELS, max(_CAMERA_PIXELS, _MAX_BYTES // bytes_per_pixel(image))))


def is_large(image: Image.Image) -> bool:
    """Whether a picture is so large that :func:`square_of_large` should scale it."""
    return image.width * image.height > _LARGE_PIXELS


class _Room:
    """The memory of all pictures that are being decoded, in any thread."""

    def __init__(self) -> None:
        self._taken = 0
        self._changed = Condition()

    @contextmanager
    def take(self, wanted: int) -> Iterator[None]:
        """Wait until there is room. A picture that is larger than all of it gets it when nothing else is decoded."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + wanted <= _MAX_BYTES)
            self._taken += wanted
        try:
            yield
        finally:
            with self._changed:
                self._taken -= wanted
                self._changed.notify_all()


_room = _Room()


def room_for(image: Image.Image) -> AbstractContextManager[None]:
    """Return a context in which a picture can be decoded: all that are at a time stay within the memory for one."""
    wanted = image.width * image.height * bytes_per_pixel(image)
    return nullcontext() if wanted < _SMALL_BYTES else _room.take(wanted)


def _refuse(image: Image.Image, limit: int) -> None:
    text = os.environ.get(MAX_MEGAPIXELS)
    if text is not None:
        limit = max(limit, _whole_million(text))
    if image.width * image.height > limit:
        raise TooLarge(
            f"too large: {image.width}x{image.height}, over {limit // 10**6} million pixels; {MAX_MEGAPIXELS} raises "
            "the limit"
        )


def _whole_million(text: str) -> int:
    if not text.isdecimal():
        raise RunError(f"{MAX_MEGAPIXELS}={text} must be a whole number of millions of pixels")
    return int(text) * 10**6


def to_rgb_is_free(image: Image.Image) -> bool:
    """Whether :func:`to_rgb` returns the picture itself."""
    return image.mode == "RGB" and "transparency" not in image.info


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to RGB, transparency laid on white."""
    if to_rgb_is_free(image):
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def square_of_large(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Scale the short side of a picture to ``size`` and keep the centre square, upright, ``(S, S, 3)``.

    The picture is converted to RGB in bands, and turned after it is scaled, so that there is no second one of its size.
    """
    orientation = _orientation_of(image)
    scaled = _scaled_in_bands(image, size)
    if orientation in (None, 1):
        return scaled
    turned = Image.fromarray(scaled)
    turned.getexif()[_ORIENTATION] = orientation
    ImageOps.exif_transpose(turned, in_place=True)
    return np.asarray(turned)


def _orientation_of(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # a damaged tag, of many kinds; damaged pixels will say so later
        return None


def _scaled_in_bands(image: Image.Image, size: int) -> NDArray[np.uint8]:
    side = min(image.size)
    left, top, scale = (image.width - side) / 2, (image.height - side) / 2, side / size
    reach = max(scale, 1) + 1  # rows beyond its own that a row of the result is mixed from
    rows = max(1, floor(_BAND / image.width / scale))
    if to_rgb_is_free(image):
        box = (left, top, left + side, top + side)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    result = np.empty((size, size, 3), dtype=np.uint8)
    for first in range(0, size, rows):
        last = min(first + rows, size)
        upper = max(0, floor(top + first * scale - reach))
        lower = min(image.height, ceil(top + last * scale + reach))
        band = to_rgb(image.crop((0, upper, image.width, lower)))
        box = (left, top + first * scale - upper, left + side, min(top + last * scale, image.height) - upper)
        result[first:last] = np.asarray(band.resize((size, last - first), Image.Resampling.BILINEAR, box))
    return result
