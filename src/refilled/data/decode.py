"""Decode pictures of any format to one uint8 tensor of square RGB images.

A picture that cannot be read is left out with a reason and never stops the run. Only regular files are opened, only the
listed formats are tried, and the number of pixels is read from the header before any pixel is decoded.
"""

import re
import stat
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from refilled.data.grey import (
    FORMATS_SCALED_BY_PILLOW,
    FULL,
    NO_RANGE,
    Extremes,
    GreyRange,
    extremes,
    is_deep,
    levels_of,
    range_of,
    to_bytes,
)
from refilled.data.picture_memory import is_large, refuse_large, refuse_large_file, room_for, square_of_large, to_rgb
from refilled.data.source import Crop, Picture
from refilled.errors import TaskError

_ALWAYS = {
    "PNG": {".png"},
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
    "WEBP": {".webp"},
    "BMP": {".bmp", ".dib"},
    "GIF": {".gif"},
    "TIFF": {".tif", ".tiff"},
    "PPM": {".ppm", ".pgm", ".pbm", ".pnm"},
}


def _readable_formats() -> dict[str, set[str]]:
    """Return the formats that the installed Pillow reads, with their file suffixes."""
    formats = dict(_ALWAYS)
    if features.check("avif"):
        formats["AVIF"] = {".avif"}
    if features.check("jpg_2000"):
        formats["JPEG2000"] = {".jp2", ".j2k", ".jpx"}
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        formats["HEIF"] = {".heic", ".heif", ".hif"}
    return formats


_FORMATS = _readable_formats()
FORMATS = tuple(_FORMATS)
SUFFIXES = frozenset().union(*_FORMATS.values())
"""File suffixes of the formats."""

_FIRST_BYTES = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|II\*\0|MM\0\*", re.DOTALL)

_BATCH = 128  # encoded pictures held in memory at a time


class _Unreadable(Exception):
    """The reason to leave out a picture."""


def decode(picture: Picture, size: int, grey: GreyRange | None = None) -> NDArray[np.uint8]:
    """Decode one picture to RGB ``(S, S, 3)``: upright, short side scaled to ``size``, centre square kept.

    A :class:`Crop` is scaled as a whole, since its box contains the subject. Of an animation, the first frame is used.
    Transparent pixels are blended with white. More than 8 bits per channel are scaled to 8.

    Args:
        picture: The encoded picture.
        size: Side length S of the image.
        grey: Black and white of pictures with more than 8 bits per channel. None: such pictures are unreadable.

    Raises:
        Exception: The picture cannot be read. The type varies; :func:`describe` returns the reason.
    """
    if isinstance(picture, np.ndarray):
        return _square(Image.fromarray(picture), size)
    box, picture = (picture.box, picture.path) if isinstance(picture, Crop) else (None, picture)
    with _open(picture) as file, _identify(file) as opened:
        image: Image.Image = opened
        refuse_large_file(image)
        if box is None:
            # JPEG only: decode at a fraction of the picture's size, but at least twice the target.
            image.draft(None, (2 * size, 2 * size))
        refuse_large(image)
        with room_for(image):
            if is_deep(image):
                image = _to_8_bits(image, file, grey)
            if box is not None:
                return _crop(image, box, size)
            return square_of_large(image, size) if is_large(image) else _upright_square(image, size)


def find_grey_range(pictures: Iterable[Picture]) -> GreyRange | None:
    """Return black and white of the pictures with more than 8 bits per channel; None if there are none.

    The headers of all pictures are read, and those with more than 8 bits are decoded.
    """
    levels: list[Extremes] = []
    remaining = iter(pictures)
    with warnings.catch_warnings(), ThreadPoolExecutor(torch.get_num_threads()) as executor:
        warnings.simplefilter("ignore")
        while batch := list(islice(remaining, _BATCH)):
            levels += (each for each in executor.map(_extremes, batch) if each is not None)
    return range_of(levels)


def has_deep(pictures: Iterable[Picture]) -> bool:
    """Return whether one of the pictures has more than 8 bits per channel, from the headers alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return any(_has_unknown_range(picture) for picture in pictures)


def _has_unknown_range(picture: Picture) -> bool:
    if isinstance(picture, np.ndarray):
        return False
    with suppress(Exception), _open(_file_of(picture)) as file, _identify(file) as image:
        return is_deep(image) and image.format not in FORMATS_SCALED_BY_PILLOW
    return False


def _extremes(picture: Picture) -> Extremes | None:
    if not _has_unknown_range(picture) or isinstance(picture, np.ndarray):
        return None
    with suppress(Exception), _open(_file_of(picture)) as file, _identify(file) as image:
        refuse_large(image)
        with room_for(image):
            return extremes(levels_of(image, file)[0])
    return None  # decode() will give the reason


def header_size(picture: bytes) -> tuple[int, int]:
    """Return the width and height of an encoded picture, from the header alone.

    Raises:
        Exception: It is not a readable picture. The type varies; :func:`describe` returns the reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(picture) as file, _identify(file) as image:
            return image.size


def short_side(picture: Picture) -> int | None:
    """Return the length of the short side in pixels, from the header alone; None if it cannot be read."""
    if isinstance(picture, np.ndarray):
        return int(min(picture.shape[:2]))
    if isinstance(picture, Crop):
        left, top, right, bottom = picture.box
        return max(1, int(min(right - left, bottom - top)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(picture) as file, _identify(file) as image:
                return min(image.size)
    except Exception:  # Pillow raises many types for broken files; decode() will give the reason
        return None


def read_pixels(
    pictures: Iterable[Picture], count: int, size: int, grey: GreyRange | None = None
) -> tuple[Tensor, dict[int, str]]:
    """Decode ``count`` pictures into one tensor.

    Args:
        pictures: The encoded pictures.
        count: Number of pictures, N.
        size: Side length S of the images.
        grey: Black and white of pictures with more than 8 bits per channel. None: such pictures are unreadable.

    Returns:
        The M readable images in their order, uint8 ``(M, 3, S, S)`` in channels-last memory; and for each unreadable
        picture its position and the reason.

    Raises:
        TaskError: The images do not fit in memory.
    """
    pixels = _allocate(count, size)
    array = pixels.numpy()
    reasons: dict[int, str] = {}

    def work(numbered: list[tuple[int, Picture]]) -> None:
        for position, picture in numbered:
            try:
                array[position] = decode(picture, size, grey)
            except Exception as error:  # of any type: a broken file must not stop the run
                reasons[position] = describe(error)

    remaining = enumerate(pictures)
    # One thread is faster for small pictures, which are limited by the interpreter's lock, not by the decoder.
    threads = torch.get_num_threads() if size > 64 else 1
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as executor:
        warnings.simplefilter("ignore")  # Pillow warns about pictures that it reads correctly
        while batch := list(islice(remaining, _BATCH)):
            list(executor.map(work, [batch[start::threads] for start in range(threads)]))
    readable = np.ones(count, dtype=bool)
    readable[list(reasons)] = False
    return keep(pixels.permute(0, 3, 1, 2), readable), dict(sorted(reasons.items()))


def keep(pixels: Tensor, wanted: NDArray[np.bool_]) -> Tensor:
    """Return the ``wanted`` images of ``(N, 3, S, S)``, moved forward in place to avoid a second copy in memory."""
    for to, origin in enumerate(np.flatnonzero(wanted).tolist()):
        if to != origin:
            pixels[to] = pixels[origin]
    return pixels[: int(wanted.sum())]


def describe(error: Exception) -> str:
    """Return a short reason why a picture could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture in a known format ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()  # without the path, which is printed next to the reason
    return str(error) or type(error).__name__


def is_encoded_picture(path: Path) -> bool:
    """Return whether a regular file begins with the signature of a common picture format."""
    if not regular_file_size(path):
        return False
    try:
        with path.open("rb") as file:
            return _FIRST_BYTES.match(file.read(12)) is not None
    except OSError:
        return False


def regular_file_size(path: Path) -> int | None:
    """Return the size of a regular file in bytes; None for anything else."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _identify(file: IO[bytes]) -> Image.Image:
    """Read the header of a picture, without Pillow's limit on its size, which refuses large photographs."""
    Image.MAX_IMAGE_PIXELS = None
    return Image.open(file, formats=FORMATS)


def _file_of(picture: bytes | Path | Crop) -> bytes | Path:
    return picture.path if isinstance(picture, Crop) else picture


def _open(picture: bytes | Path) -> IO[bytes]:
    if isinstance(picture, bytes):
        if not picture:
            raise _Unreadable("empty")
        return BytesIO(picture)
    status = picture.stat()
    if stat.S_ISDIR(status.st_mode):
        raise _Unreadable("a directory")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
        raise _Unreadable("not a regular file")
    if status.st_size == 0:
        raise _Unreadable("empty")
    return picture.open("rb")


def _upright_square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    with suppress(Exception):  # a damaged orientation tag is ignored; damaged pixels raise an error below
        ImageOps.exif_transpose(image, in_place=True)
    return _square(image, size)


def _square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    image = to_rgb(image)
    side = min(image.size)
    if image.size != (size, size):
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    return np.asarray(image)


def _crop(image: Image.Image, box: tuple[float, float, float, float], size: int) -> NDArray[np.uint8]:
    left, top, right, bottom = map(round, box)
    inside = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise _Unreadable(f"its box ({left}, {top}, {right}, {bottom}) lies outside the picture")
    # Crop before scaling: resize() with a box would mix in pixels from outside the box.
    return np.asarray(to_rgb(image).crop(inside).resize((size, size), Image.Resampling.BILINEAR))


def _to_8_bits(image: Image.Image, file: IO[bytes], grey: GreyRange | None) -> Image.Image:
    """Scale a picture with more than 8 bits per channel to 8."""
    scale = FULL if image.format in FORMATS_SCALED_BY_PILLOW else grey
    if scale is None:
        raise _Unreadable(NO_RANGE)
    levels, opacity = levels_of(image, file)
    scaled = Image.fromarray(to_bytes(levels, scale))
    if opacity is not None:
        scaled.putalpha(Image.fromarray(opacity))
    scaled.getexif().update(image.getexif())  # for the orientation tag
    return scaled


def _allocate(count: int, size: int) -> Tensor:
    """Return an uninitialised tensor ``(N, S, S, 3)``."""
    try:
        return torch.empty((count, size, size, 3), dtype=torch.uint8)
    except RuntimeError as error:
        raise TaskError(
            f"{count} images of {size}x{size} need {count * size * size * 3 / 2**30:.1f} GiB and do not fit "
            f"in memory ({describe(error)}); keep them on disk with --image-memory 0, or use a smaller image size or "
            "fewer shots"
        ) from error
