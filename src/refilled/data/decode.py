"""From encoded pictures to one uint8 tensor of square RGB images, whatever the pictures are.

A picture that cannot be read is left out with a reason and never stops the run: nothing but regular files is opened,
nothing but the listed formats is tried, and the number of pixels is read from the header before any is decoded.
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
    """Return the formats that the installed Pillow reads, with the suffixes of their files."""
    found = dict(_ALWAYS)
    if features.check("avif"):
        found["AVIF"] = {".avif"}
    if features.check("jpg_2000"):
        found["JPEG2000"] = {".jp2", ".j2k", ".jpx"}
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        found["HEIF"] = {".heic", ".heif", ".hif"}
    return found


_FORMATS = _readable_formats()
FORMATS = tuple(_FORMATS)
SUFFIXES = frozenset().union(*_FORMATS.values())
"""File names that promise one of the formats."""

_FIRST_BYTES = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|II\*\0|MM\0\*", re.DOTALL)

_BATCH = 128  # encoded pictures held in memory at a time


class _Unreadable(Exception):
    """Why a picture is left out."""


def decode(picture: Picture, size: int, grey: GreyRange | None = None) -> NDArray[np.uint8]:
    """Decode one picture to RGB ``(S, S, 3)``: upright, short side scaled to ``size``, centre square kept.

    A :class:`Crop` is scaled as a whole instead: its box was put around what counts.

    The first frame of an animation is taken, transparency laid on white, more than 8 bits a channel scaled to 8.

    Args:
        picture: The encoded picture.
        size: Side length S of the image.
        grey: Black and white of pictures with more than 8 bits a channel; None to refuse those.

    Raises:
        Exception: Of many kinds; :func:`describe` turns them into a reason.
    """
    if isinstance(picture, np.ndarray):
        return _square(Image.fromarray(picture), size)
    cut_out, picture = (picture.box, picture.path) if isinstance(picture, Crop) else (None, picture)
    with _open(picture) as file, _identify(file) as opened:
        image: Image.Image = opened
        refuse_large_file(image)
        if cut_out is None:
            image.draft(None, (2 * size, 2 * size))  # JPEG only: decode at a fraction of the size, at least twice ours
        refuse_large(image)
        with room_for(image):
            if is_deep(image):
                image = _shallow(image, file, grey)
            if cut_out is not None:
                return _cut_out(image, cut_out, size)
            return square_of_large(image, size) if is_large(image) else _upright_square(image, size)


def find_grey_range(pictures: Iterable[Picture]) -> GreyRange | None:
    """Find what is black and white over pictures with more than 8 bits a channel; None if there are none.

    All pictures are opened, and those with more than 8 bits decoded.
    """
    found: list[Extremes] = []
    remaining = iter(pictures)
    with warnings.catch_warnings(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        warnings.simplefilter("ignore")
        while batch := list(islice(remaining, _BATCH)):
            found += (each for each in pool.map(_extremes, batch) if each is not None)
    return range_of(found)


def has_deep(pictures: Iterable[Picture]) -> bool:
    """Whether one of the pictures has more than 8 bits a channel, from the headers alone."""
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
        Exception: Of many kinds, where it is no picture; :func:`describe` turns them into a reason.
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
    except Exception:  # Pillow's plugins raise many kinds on broken files; decode() will give the reason
        return None


def read_pixels(
    pictures: Iterable[Picture], count: int, size: int, grey: GreyRange | None = None
) -> tuple[Tensor, dict[int, str]]:
    """Decode ``count`` pictures into one tensor.

    Args:
        pictures: The encoded pictures.
        count: How many there are, N.
        size: Side length S of the images.
        grey: Black and white of pictures with more than 8 bits a channel; None to refuse those.

    Returns:
        uint8 ``(M, 3, S, S)`` in channels-last memory, of the M readable ones in their order, and for each other one
        its position and the reason.

    Raises:
        TaskError: There is no room for them in memory.
    """
    pixels = _allocate(count, size)
    array = pixels.numpy()
    reasons: dict[int, str] = {}

    def work(numbered: list[tuple[int, Picture]]) -> None:
        for position, picture in numbered:
            try:
                array[position] = decode(picture, size, grey)
            except Exception as error:  # of any kind: a broken file must not stop the run
                reasons[position] = describe(error)

    remaining = enumerate(pictures)
    # Small pictures are decoded faster by one thread: the interpreter's lock, not the decoder, is their limit.
    threads = torch.get_num_threads() if size > 64 else 1
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # Pillow warns of oddities in pictures that it reads well
        while batch := list(islice(remaining, _BATCH)):
            list(pool.map(work, [batch[start::threads] for start in range(threads)]))
    readable = np.ones(count, dtype=bool)
    readable[list(reasons)] = False
    return keep(pixels.permute(0, 3, 1, 2), readable), dict(sorted(reasons.items()))


def keep(pixels: Tensor, wanted: NDArray[np.bool_]) -> Tensor:
    """Keep the images ``wanted`` of ``(N, 3, S, S)`` by moving them forward in place: no second copy in memory."""
    for to, origin in enumerate(np.flatnonzero(wanted).tolist()):
        if to != origin:
            pixels[to] = pixels[origin]
    return pixels[: int(wanted.sum())]


def describe(error: Exception) -> str:
    """Return in a few words why a picture could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture in a known format ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()  # without the path, which stands beside the reason
    return str(error) or type(error).__name__


def is_encoded_picture(path: Path) -> bool:
    """Return whether a regular file begins like a picture in one of the common formats."""
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
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _identify(file: IO[bytes]) -> Image.Image:
    """Read the header of a picture. The limit on its pixels is ours, since Pillow's refuses large photographs."""
    Image.MAX_IMAGE_PIXELS = None
    return Image.open(file, formats=FORMATS)


def _file_of(picture: bytes | Path | Crop) -> bytes | Path:
    return picture.path if isinstance(picture, Crop) else picture


def _open(picture: bytes | Path) -> IO[bytes]:
    if isinstance(picture, bytes):
        if not picture:
            raise _Unreadable("empty")
        return BytesIO(picture)
    found = picture.stat()
    if stat.S_ISDIR(found.st_mode):
        raise _Unreadable("a directory")
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise _Unreadable("not a regular file")
    if found.st_size == 0:
        raise _Unreadable("empty")
    return picture.open("rb")


def _upright_square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    with suppress(Exception):  # a damaged orientation tag; damaged pixels will say so below
        ImageOps.exif_transpose(image, in_place=True)
    return _square(image, size)


def _square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    image = to_rgb(image)
    side = min(image.size)
    if image.size != (size, size):
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    return np.asarray(image)


def _cut_out(image: Image.Image, box: tuple[float, float, float, float], size: int) -> NDArray[np.uint8]:
    left, top, right, bottom = map(round, box)
    inside = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise _Unreadable(f"its box ({left}, {top}, {right}, {bottom}) holds nothing of the picture")
    # Cut before scaling: resize() with a box would mix in what lies around it.
    return np.asarray(to_rgb(image).crop(inside).resize((size, size), Image.Resampling.BILINEAR))


def _shallow(image: Image.Image, file: IO[bytes], grey: GreyRange | None) -> Image.Image:
    """Bring a picture with more than 8 bits a channel to 8."""
    scale = FULL if image.format in FORMATS_SCALED_BY_PILLOW else grey
    if scale is None:
        raise _Unreadable(NO_RANGE)
    levels, opacity = levels_of(image, file)
    shallow = Image.fromarray(to_bytes(levels, scale))
    if opacity is not None:
        shallow.putalpha(Image.fromarray(opacity))
    shallow.getexif().update(image.getexif())  # which may say that it lies on its side
    return shallow


def _allocate(count: int, size: int) -> Tensor:
    """Return room for ``(N, S, S, 3)`` bytes."""
    try:
        return torch.empty((count, size, size, 3), dtype=torch.uint8)
    except RuntimeError as error:
        raise TaskError(
            f"{count} images of {size}x{size} need {count * size * size * 3 / 2**30:.1f} GiB, for which there is no "
            f"room in memory ({describe(error)}); keep them on disk with --image-memory 0, or ask for a smaller image "
            "size or fewer shots"
        ) from error
