"""Bad and odd pictures: each is read as it should be, or listed with its reason, and nothing stops or hangs."""

import os
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from refilled.data import decode as decode_module
from refilled.data.decode import FORMATS, decode, keep, read_pixels, short_side
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


def test_large_pictures_wait_for_each_other_and_come_out_alike(monkeypatch):
    picture = encoded(Image.fromarray(RAMP))
    usual = decode(picture, 8)
    monkeypatch.setattr(decode_module, "_LARGE", 10)
    assert np.array_equal(decode(picture, 8), usual)


def test_keeping_some_images_needs_no_second_copy():
    pixels = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).repeat(1, 3, 2, 2)
    kept = keep(pixels, np.array([False, True, False, True, True]))
    assert kept[:, 0, 0, 0].tolist() == [1, 3, 4]
    assert kept.data_ptr() == pixels.data_ptr()
