"""Bad and odd pictures: each is read as it should be, or listed with its reason, and nothing stops or hangs."""

import os
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refilled.data import decode as decode_module
from refilled.data import picture_memory
from refilled.data.decode import FORMATS, decode, keep, read_pixels, short_side
from refilled.data.picture_memory import square_of_large
from refilled.errors import TaskError

RAMP = (7 * np.indices((16, 16, 3)).sum(0)).astype(np.uint8)  # (16, 16, 3), all channels different


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises any size and that holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_pictures_of_the_right_size_come_out_unchanged(kind):
    assert np.array_equal(decode(encoded(Image.fromarray(RAMP), kind), 16), RAMP)


def test_webp_and_jpeg_come_out_nearly_unchanged():
    assert np.array_equal(decode(encoded(Image.fromarray(RAMP), "WEBP", lossless=True), 16), RAMP)
    jpeg = decode(encoded(Image.fromarray(RAMP), "JPEG", quality=100, subsampling=0), 16)
    assert abs(jpeg.astype(int) - RAMP).max() < 8


def test_grey_palette_and_black_and_white_become_rgb():
    grey = Image.fromarray(RAMP[:, :, 0])
    assert np.array_equal(decode(encoded(grey), 16), np.repeat(RAMP[:, :, :1], 3, 2))
    palette = Image.fromarray(RAMP[:, :, 0]).convert("P")
    assert np.array_equal(decode(encoded(palette), 16), np.repeat(RAMP[:, :, :1], 3, 2))
    assert set(np.unique(decode(encoded(grey.convert("1")), 16))) == {0, 255}


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    half = Image.new("LA", (16, 16), (0, 128))
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    for picture in (encoded(clear), encoded(palette, transparency=0), encoded(clear, "WEBP", lossless=True)):
        assert (decode(picture, 16) == 255).all()
    assert set(np.unique(decode(encoded(half), 16))) == {127}


def test_cmyk_becomes_rgb():
    picture = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    red, green, blue = decode(picture, 16)[8, 8].tolist()
    assert red > 240
    assert max(green, blue) < 15


def test_orientation_is_applied():
    picture = Image.new("RGB", (32, 16), "black")
    picture.paste("white", (0, 0, 16, 16))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    upright = decode(encoded(picture, exif=exif), 8)
    assert (upright[0] == 255).all()  # left became top
    assert (upright[-1] == 0).all()


def test_damaged_orientation_does_not_cost_the_picture():
    assert np.array_equal(decode(encoded(Image.fromarray(RAMP), exif=b"Exif\0\0MM\0*\xff\xff"), 16), RAMP)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        picture = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode(picture, 16)[8, 8].tolist() == pytest.approx([255, 0, 0], abs=3)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (17, 16)])
def test_the_centre_square_is_kept_and_scaled(shape):
    height, width = shape
    picture = np.zeros((height, width, 3), np.uint8)
    top, left = (height - 16) // 2, (width - 16) // 2
    picture[top : top + 16, left : left + 16] = 200
    assert decode(encoded(Image.fromarray(picture)), 8)[1:-1, 1:-1].min() > 190
    assert short_side(encoded(Image.fromarray(picture))) == 16


def test_large_jpegs_are_shrunk_while_they_are_decoded_without_harm():
    smooth = Image.fromarray(RAMP).resize((1024, 1024), Image.Resampling.BILINEAR)
    ours = decode(encoded(smooth, "JPEG", quality=95), 16).astype(int)
    plain = np.asarray(smooth.resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    assert abs(ours - plain).max() < 6


UNKNOWN = f"not a picture in a known format ({', '.join(FORMATS)})"
LIMIT = "80 million pixels; REFILLED_MAX_MEGAPIXELS raises the limit"


@pytest.fixture
def bad_files(tmp_path):
    good = encoded(Image.fromarray(RAMP), "JPEG")
    contents = {
        "zero.png": b"",
        "truncated.png": encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))[
            :3000
        ],
        "truncated.jpg": good[: len(good) // 2],
        "text.jpg": b"not a picture",
        "bomb.png": png_of_size(50_000, 50_000),
        "large.png": png_of_size(10_000, 9_000),
        "vector.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "header.png": b"\x89PNG\r\n\x1a\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "directory.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path


def test_each_bad_file_is_listed_with_its_reason_and_the_others_are_read(bad_files):
    (bad_files / "good.png").write_bytes(encoded(Image.fromarray(RAMP)))
    paths = sorted(bad_files.iterdir())
    pixels, reasons = read_pixels(paths, len(paths), 16)
    reason_of = {paths[position].name: reason for position, reason in reasons.items()}
    assert all("truncated" in reason_of.pop(name).lower() for name in ("truncated.png", "truncated.jpg"))
    assert reason_of == {
        "zero.png": "empty",
        "text.jpg": UNKNOWN,
        "bomb.png": f"too large: 50000x50000, over {LIMIT}",
        "large.png": f"too large: 10000x9000, over {LIMIT}",
        "vector.png": UNKNOWN,
        "header.png": UNKNOWN,
        "directory.png": "a directory",
        "loop.png": "too many levels of symbolic links",
        "dangling.png": "no such file or directory",
        "pipe.png": "not a regular file",
    }
    assert torch.equal(pixels[0].permute(1, 2, 0), torch.from_numpy(RAMP))
    assert all(short_side(path) is None for path in paths if path.name in ("zero.png", "pipe.png", "text.jpg"))


def test_an_unreadable_file_is_listed(tmp_path, monkeypatch):
    file = tmp_path / "secret.png"
    file.write_bytes(encoded(Image.fromarray(RAMP)))

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(type(file), "open", refuse)  # file modes do not bind the superuser, who may run this
    assert read_pixels([file], 1, 16)[1] == {0: "permission denied"}


def test_order_is_kept_around_bad_pictures_and_over_batches():
    pictures = [encoded(Image.new("RGB", (8, 8), (number % 256, 0, 0))) for number in range(300)]
    pictures[::7] = [b"bad"] * len(pictures[::7])
    pixels, reasons = read_pixels(iter(pictures), 300, 8)
    assert list(reasons) == list(range(0, 300, 7))
    assert pixels[:, 0, 0, 0].tolist() == [number % 256 for number in range(300) if number % 7]


def test_threads_do_not_matter(monkeypatch):
    pictures = [encoded(Image.new("RGB", (100, 90), (number, 0, 0))) for number in range(20)]
    alone, _ = read_pixels(pictures, 20, 80)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(read_pixels(pictures, 20, 80)[0], alone)


def test_too_little_memory_is_said(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(TaskError, match=r"0\.7 GiB.*can't allocate memory.*smaller image size"):
        read_pixels([], 1000, 500)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "CMYK"])
@pytest.mark.parametrize(("width", "height", "size"), [(301, 200, 64), (200, 333, 224), (500, 101, 7), (640, 480, 480)])
def test_a_picture_scaled_in_bands_is_what_it_is_scaled_at_once(monkeypatch, mode, width, height, size):
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(levels[..., :3]) if mode == "CMYK" else Image.fromarray(levels)
    monkeypatch.setattr(picture_memory, "_BAND", 20_000)
    for orientation in (1, 6, 4):
        picture = image.convert(mode)
        picture.getexif()[0x0112] = orientation
        in_bands = square_of_large(picture, size).astype(int)
        at_once = decode_module._upright_square(picture, size).astype(int)
        assert abs(in_bands - at_once).max() <= (1 if orientation == 1 else 2)


def test_large_pictures_wait_for_each_other_and_come_out_alike(monkeypatch):
    pictures = [encoded(Image.fromarray(RAMP + number)) for number in range(8)]
    usual = [decode(picture, 8) for picture in pictures]
    taken, most = 0, 0

    def entered(image, size):
        nonlocal taken, most
        taken += 1
        most = max(most, taken)
        time.sleep(0.01)
        taken -= 1
        return square_of_large(image, size)

    monkeypatch.setattr(picture_memory, "_SMALL_BYTES", 10)
    monkeypatch.setattr(picture_memory, "_LARGE_PIXELS", 10)
    monkeypatch.setattr(picture_memory, "_MAX_BYTES", RAMP.shape[0] * RAMP.shape[1] * 4)  # room for one of them
    monkeypatch.setattr(decode_module, "square_of_large", entered)
    with ThreadPoolExecutor(4) as pool:
        assert np.array_equal(list(pool.map(lambda picture: decode(picture, 8), pictures)), usual)
    assert most == 1


PEAK = """
import sys
from pathlib import Path
from refilled.data.decode import decode, describe
from refilled.data.grey import FULL
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1000
for path in map(Path, sys.argv[1:]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = memory("VmRSS")
    try:
        decode(path, 64, FULL)
        said = "read"
    except Exception as error:
        said = describe(error)
    print(path.stem, memory("VmHWM") - before, said, sep="|")
"""

LYING = Image.Exif()
LYING[0x0112] = 6
HUGE = {
    "png": ("RGB", (8000, 6000), "png", {}, "read"),
    "transparent": ("RGBA", (6400, 5000), "png", {}, "read"),
    "palette": ("P", (8900, 8900), "png", {}, "read"),
    "lying": ("RGB", (8000, 6000), "png", {"exif": LYING}, "read"),
    "strip": ("RGB", (5200, 5200), "tif", {"compression": "tiff_lzw", "strip_size": 2**30}, "read"),
    "webp": ("RGB", (4000, 3000), "webp", {"method": 0, "quality": 1}, "read"),
    "sixteen": ("I;16", (4900, 4900), "png", {}, "read"),
    "bomb": ("RGB", (10_000, 10_000), "png", {}, "too large: 10000x10000"),
    "webp bomb": ("RGB", (8000, 8000), "webp", {"method": 0, "quality": 1}, "too large: 8000x8000"),
    "progressive": ("L", (9000, 9000), "jpg", {"progressive": True}, "too large: 9000x9000"),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from Linux")
def test_a_huge_picture_raises_the_peak_of_memory_by_less_than_200_mb(tmp_path):
    files = []
    for kind, (mode, size, suffix, options, _) in HUGE.items():
        files.append(tmp_path / f"{kind}.{suffix}")
        Image.new(mode, size).save(files[-1], **options)
    run = [sys.executable, "-c", PEAK, *map(str, files)]
    done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=300)
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert [kind for kind, _, _ in lines] == list(HUGE)
    assert all(said.startswith(HUGE[kind][-1]) for kind, _, said in lines), lines
    assert max(float(megabytes) for _, megabytes, _ in lines) < 200, lines


def test_keeping_some_images_needs_no_second_copy():
    pixels = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).repeat(1, 3, 2, 2)
    kept = keep(pixels, np.array([False, True, False, True, True]))
    assert kept[:, 0, 0, 0].tolist() == [1, 3, 4]
    assert kept.data_ptr() == pixels.data_ptr()
