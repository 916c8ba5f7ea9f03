"""Printed letters: a small generated data set without digits, for teachers of students that classify digits."""

from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from refilled.data.keyed import keyed_uniform
from refilled.data.source import ArrayPart, Source
from refilled.files import cache_folder, write_atomic

SUMMARY = "10,240 printed letters, 128 classes, 8x8; drawn from matplotlib's fonts, needs no download"
CITATION = "drawn from the fonts that come with matplotlib: DejaVu (Bitstream Vera licence)"

_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
)
LETTERS = tuple(
    "acdefhkmnprtuvwxyACEFGHJKLMNPRTUVWXY"
    "ΓΔΛΞΠΣΨΩαγηκλμνξπτυχψω"
    "БДЖИЙЛУЦШЩЪЫЮЯгджийклмнптцшщъыюя"
    "ЂЉЊЋЏЎђљњћџҐґҒғҔҕҖҗҚқҢңҤҥҪҫҬҭҰұҲҳҺӃӄӇӈ"
)
"""The classes, without letters that look like a digit (O, l, Z, З, Ч, S, б, B, g) or like an earlier letter."""

_TRAIN, _TEST = 70, 10  # images per class
_SIDE, _CANVAS, _POINTS = 8, 64, 40  # pixels of an image and of the canvas, height of a letter
_VERSION = 2  # of the drawing procedure; part of the key of the cache
_CHECKSUM_BYTES = sha256().digest_size


def open_letters() -> Source:
    """Open the letters: Latin, Greek and Cyrillic, in eight fonts, each rotated, slanted and stretched at random.

    The distortion of an image is a pure function of its class and its number. The images are drawn once, which takes
    a few seconds, and are then read from the cache.

    References: the DejaVu fonts, https://dejavu-fonts.github.io.
    """
    pixels = _drawn_once()
    parts = {}
    for name, first, count in (("train", 0, _TRAIN), ("test", _TRAIN, _TEST)):
        images = pixels[:, first : first + count].reshape(-1, _SIDE, _SIDE)
        labels = np.repeat(np.arange(len(LETTERS)), count)
        parts[name] = ArrayPart(labels, images, f"letters-{name}")
    return Source(
        classes=tuple(f"{letter} {ord(letter):04x}" for letter in LETTERS),
        train=parts["train"],
        test=parts["test"],
        fixed=True,
        augmentation="crop",  # a mirrored letter may be another letter
        image_size=16,  # that of the digits
        licence="Bitstream Vera",
        citation=CITATION,
    )


def _drawn_once() -> NDArray[np.uint8]:
    """Return the images ``(C, N, S, S)`` from the cache. If they are missing, draw and cache them."""
    path = cache_folder() / "letters" / f"{_key()}.bin"
    shape = (len(LETTERS), _TRAIN + _TEST, _SIDE, _SIDE)
    if (content := _whole_content(path)) is not None:
        return np.frombuffer(content, dtype=np.uint8).reshape(shape)
    pixels = _draw_all()
    content = pixels.tobytes()
    with suppress(OSError):  # the cache only saves time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content + sha256(content).digest())
    return pixels


def _whole_content(path: Path) -> bytes | None:
    """Return the content of a cached file. None: it does not exist, or its checksum does not match."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    content, checksum = stored[:-_CHECKSUM_BYTES], stored[-_CHECKSUM_BYTES:]
    return content if sha256(content).digest() == checksum else None


def _key() -> str:
    """Return a digest of all that the images depend on: version, classes, fonts, and the drawing library."""
    import PIL

    fonts = b"".join(sha256(_font_file(name).read_bytes()).digest() for name in _FONTS)
    about = f"{_VERSION} {PIL.__version__} {''.join(LETTERS)}".encode()
    return sha256(about + fonts).hexdigest()[:16]


def _font_file(name: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


def _draw_all() -> NDArray[np.uint8]:
    images = _TRAIN + _TEST
    fonts = [ImageFont.truetype(str(_font_file(name)), _POINTS) for name in _FONTS]
    chance = keyed_uniform(0, "letters", np.arange(len(LETTERS) * images * 4)).reshape(len(LETTERS), images, 4)
    pixels = np.empty((len(LETTERS), images, _SIDE, _SIDE), dtype=np.uint8)
    for place, letter in enumerate(LETTERS):
        printed = [_print(letter, font) for font in fonts]
        for number in range(images):
            pixels[place, number] = _distort(printed[number % len(fonts)], chance[place, number])
    return pixels


def _print(letter: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Print a letter in the middle of the canvas, white on black."""
    image = Image.new("L", (_CANVAS, _CANVAS))
    drawing = ImageDraw.Draw(image)
    left, top, right, bottom = drawing.textbbox((0, 0), letter, font=font)
    drawing.text(((_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2), letter, fill=255, font=font)
    return image


def _distort(image: Image.Image, chance: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Rotate by up to 17 degrees, slant, stretch by 0.75 to 1.3, crop, and scale to the size of a digit.

    Args:
        image: The printed letter.
        chance: Four numbers in [0, 1), for the angle, the slant, and the horizontal and vertical stretch.
    """
    angle, slant = 0.6 * chance[0] - 0.3, 0.8 * chance[1] - 0.4
    across, down = 0.75 + 0.55 * chance[2:]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, slant], [0, 1]]) @ np.diag([1 / across, 1 / down])
    shift = _CANVAS / 2 - matrix @ np.full(2, _CANVAS / 2)
    coefficients = (*matrix[0], shift[0], *matrix[1], shift[1])
    turned = image.transform((_CANVAS, _CANVAS), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    letter = turned.crop(turned.getbbox())
    side = max(letter.size) + 2
    square = Image.new("L", (side, side))
    square.paste(letter, ((side - letter.width) // 2, (side - letter.height) // 2))
    return np.asarray(square.resize((_SIDE, _SIDE), Image.Resampling.BOX))
