"""More than 8 bits per channel: one range for a whole data set, found in the training images, recorded and said."""

import json
import shutil
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.data import load_pool, load_task
from refilled.data.decode import decode, find_grey_range, read_pixels
from refilled.data.grey import FULL, GreyRange
from refilled.errors import RefilledError, TaskError
from refilled.models import load_model

SIDE = 16
TRAIN = ["--model", "wrn_10_1", "--threads", "1", "--quiet"]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, RefilledError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def encoded(levels: np.ndarray, kind: str = "TIFF", **options) -> bytes:
    file = BytesIO()
    Image.fromarray(levels).save(file, kind, **options)
    return file.getvalue()


def deep_png(levels: np.ndarray) -> bytes:
    """Write uint16 colours ``(H, W, C)`` as a PNG of 16 bits, which Pillow cannot."""
    height, width, channels = levels.shape

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep_tiff(levels: np.ndarray, order: str) -> bytes:
    """Write uint16 RGB ``(H, W, 3)`` as a TIFF of 16 bits, not compressed."""
    height, width, _ = levels.shape
    body = levels.astype(f"{order}u2").tobytes()
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 0), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 0),
            (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, len(body))]  # fmt: skip
    end = 8 + 2 + 12 * len(tags) + 4
    places = {258: end, 273: end + 6}
    directory = struct.pack(order + "H", len(tags))
    for tag, kind, count, value in tags:
        short = kind == 3 and count == 1
        directory += struct.pack(order + ("HHIHH" if short else "HHII"), tag, kind, count,
                                 *((value, 0) if short else (places.get(tag, value),)))  # fmt: skip
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8)
    return start + directory + bytes(4) + struct.pack(order + "HHH", 16, 16, 16) + body


def noise(highest: int, seed: int, kind: type = np.uint16) -> np.ndarray:
    levels = np.random.default_rng(seed).integers(0, highest + 1, (SIDE, SIDE))
    levels[0, 0] = highest
    return levels.astype(kind)


def put(root: Path, picture, count: int = 20, suffix: str = "tif") -> None:
    """Write ``picture(label, number)`` of two classes."""
    for number in range(count):
        label = number % 2
        folder = root / ("dark", "bright")[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03}.{suffix}").write_bytes(picture(label, number))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "int32"])
def test_the_range_is_that_of_the_bits_in_use(tmp_path, bits, kind):
    """Numpy is the reference; one bright picture decides for all, and none is stretched for itself."""
    white = 2**bits - 1
    dtype = np.int32 if kind == "int32" else np.uint16

    def levels(number: int) -> np.ndarray:
        return noise(white if number == 3 else white // 2 + 1, number, dtype)

    for part in ("train", "test"):
        darker = part == "test"  # no picture of it reaches the white of the training images
        put(tmp_path / part, lambda _, n, d=darker: encoded(levels(n + 100 * d), "PNG" if kind == "PNG" else "TIFF"))
    for memory_limit in (None, 0):  # in memory; on disk
        task = load_task(str(tmp_path), val=0, memory_limit=memory_limit)
        assert task.grey_range == (0, white)
        assert any(f"levels 0 to {white} ({bits} bits) became 0 to 255" in note for note in task.notes)
        for split, first in ((task.train, 0), (task.test, 100)):
            for image, source in zip(split.pixels.split(1), split.sources, strict=True):
                expected = levels(int(Path(source).stem) + first).astype(np.int64) * 255 // white
                assert np.array_equal(image[0].numpy(), np.repeat(expected[None], 3, 0))


@pytest.mark.parametrize(
    ("levels", "found"),
    [
        ([[0.0, 0.25], [0.5, 1.0]], (0, 1)),
        ([[0.0, 0.25], [0.5, 0.9]], (0, 1)),
        ([[0.0, 25.5], [99.0, 254.0]], (0, 255)),
        ([[0.0, 25.0], [99.0, 4000.0]], (0, 4095)),
        ([[-1000.0, 25.0], [99.0, 3000.0]], (-1000, 3000)),
        ([[0.0, 300.5], [99.0, 70000.0]], (0, 70000)),
    ],
)
def test_the_range_of_floats_and_negative_levels_is_measured(tmp_path, levels, found):
    array = np.kron(np.array(levels, np.float32), np.ones((8, 8), np.float32))
    for values in (array, array.astype(np.int32)) if found[0] < 0 else (array,):
        put(tmp_path, lambda label, number, values=values: encoded(np.roll(values, number)))
        task = load_task(str(tmp_path))
        assert task.grey_range == found
        black, white = found
        expected = np.rint((values.astype(float) - black) / (white - black) * 255)
        number = int(Path(task.test.sources[0]).stem)
        assert np.array_equal(task.test.pixels[0, 0].numpy(), np.roll(expected, number))


@pytest.mark.slow
def test_classes_that_differ_in_brightness_alone_stay_apart_from_training_to_prediction(tmp_path):
    """A range for each image would make both classes equal; one for each folder, that of the dark ones alone bright."""

    def picture(label: int, number: int) -> bytes:
        return encoded(noise((700, 4095)[label], number), "PNG")

    put(tmp_path / "photos", picture, 80, "png")
    out = tmp_path / "run"
    run("train", tmp_path / "photos", *TRAIN, "--epochs", 15, "--batch-size", 16, "--out", out)
    assert json.loads((out / "model.json").read_text())["grey_range"] == [0, 4095]
    data = json.loads((out / "result.json").read_text())["data"]
    assert data["grey_range"] == [0, 4095]
    assert any("(12 bits)" in note for note in data["notes"])
    assert json.loads(run("evaluate", out, "--json"))["accuracy"] == 100
    put(tmp_path / "others", lambda label, number: picture(0, 500 + number), 20, "png")  # all of them dark
    found = json.loads(run("evaluate", out, tmp_path / "others", "--json"))["class_accuracies"]
    assert found == {"bright": 0, "dark": 100}
    for name, label in (("dark", 0), ("bright", 1)):
        alone = tmp_path / f"{name}.png"
        alone.write_bytes(picture(label, 999))
        assert json.loads(run("predict", out, alone, "--json"))["class"] == name
    wider = tmp_path / "wider.png"
    wider.write_bytes(encoded(noise(60000, 1), "PNG"))
    result = CliRunner().invoke(app, ["predict", str(out), str(wider), "--json"])
    assert result.exit_code == 1
    assert (
        "its levels range from 349 to 60000, but those of the training images from 0 to 4095 (12 bits)" in result.output
    )


@pytest.mark.slow
def test_a_student_of_eight_bits_does_not_guess_what_is_black_and_white(tmp_path):
    put(tmp_path / "photos", lambda label, number: encoded(noise(255, number, np.uint8), "PNG"), suffix="png")
    out = tmp_path / "run"
    run("train", tmp_path / "photos", *TRAIN, "--epochs", 1, "--out", out)
    document = json.loads((out / "model.json").read_text())
    assert document["grey_range"] is None
    (tmp_path / "x.png").write_bytes(encoded(noise(4095, 1), "PNG"))
    result = CliRunner().invoke(app, ["predict", str(out), str(tmp_path / "x.png"), "--json"])
    assert result.exit_code == 1
    assert "more than 8 bits per channel, but no training image has" in result.output
    old = shutil.copytree(out, tmp_path / "old")  # of a version that scaled everything from 16 bits
    del document["grey_range"]
    (old / "model.json").write_text(json.dumps(document))
    assert load_model(old).grey_range == FULL
    assert '"class"' in run("predict", old, tmp_path / "x.png", "--json")


def test_deep_pictures_among_others_are_found(tmp_path):
    """None of the first images is deep, and yet the range of the deep ones is found."""

    def picture(label: int, number: int) -> bytes:
        return encoded(noise(1000, number), "PNG") if number >= 90 else encoded(noise(255, number, np.uint8), "PNG")

    put(tmp_path, picture, 100, "png")
    task = load_task(str(tmp_path))
    assert task.grey_range == (0, 1023)
    assert not task.skipped
    assert sum(map(len, (task.train, task.val, task.test))) == 100


def test_the_bits_can_be_given(tmp_path):
    put(tmp_path, lambda label, number: encoded(noise(900, number)))
    task = load_task(f"{tmp_path}@bits=12")
    assert task.grey_range == (0, 4095)
    assert task.name.endswith("@bits=12")
    with pytest.raises(TaskError, match="bits=7 is out of range"):
        load_task(f"{tmp_path}@bits=7")
    with pytest.raises(
        TaskError, match=r"images cannot be read.*its levels range from 3 to 900, but .* 0 to 255 \(8 bits\)"
    ):
        load_task(f"{tmp_path}@bits=8")


def test_all_sides_of_a_class_split_share_the_range_of_the_seen_classes(tmp_path):
    for number, name in enumerate("abcd"):
        for index in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{index}.png").write_bytes(encoded(noise((4000, 90)[number > 1], index), "PNG"))
    (tmp_path / "split.json").write_text('{"seen": ["a", "b"], "unseen": ["c", "d"]}')
    for side in ("seen", "unseen"):
        assert load_pool(str(tmp_path), side).grey_range == (0, 4095)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize(
    "write", [deep_png, lambda levels: deep_tiff(levels, "<"), lambda levels: deep_tiff(levels, ">")]
)
def test_colours_of_sixteen_bits_keep_their_levels(bits, write):
    levels = np.random.default_rng(bits).integers(0, 2**bits, (SIDE, SIDE, 3)).astype(np.uint16)
    levels[0, 0] = 2**bits - 1
    content = write(levels)
    scale = find_grey_range([content])
    assert scale == (0, 2**bits - 1)
    assert np.array_equal(decode(content, SIDE, scale), levels.astype(np.int64) * 255 // (2**bits - 1))


def test_transparency_of_sixteen_bits_is_laid_on_white():
    levels = np.zeros((SIDE, SIDE, 4), np.uint16)
    levels[:8, :, 3], levels[..., :3] = 65535, 1023
    content = deep_png(levels)
    values = decode(content, SIDE, find_grey_range([content]))
    assert (values == 255).all()
    levels[..., :3] = 512
    levels[0, 0, :3] = 1023
    content = deep_png(levels)
    values = decode(content, SIDE, find_grey_range([content]))
    assert set(np.unique(values[1:8])) == {512 * 255 // 1023}
    assert (values[8:] == 255).all()
    content = deep_png(levels[..., 2:])  # grey and opacity
    values = decode(content, SIDE, find_grey_range([content]))
    assert abs(values[1:8].astype(int) - 127).max() < 16
    assert (values[8:] == 255).all()


def test_formats_that_say_their_range_are_believed():
    """A netpbm picture of 12 bits is as bright as it says, whatever levels it uses."""
    levels = np.full((SIDE, SIDE), 1000, ">u2")
    content = b"P5 16 16 4095\n" + levels.tobytes()
    assert find_grey_range([content]) is None
    assert set(np.unique(decode(content, SIDE))) == {1000 * 255 // 4095}


def test_a_deep_picture_that_lies_on_its_side_is_turned():
    levels = np.zeros((SIDE, SIDE), np.uint16)
    levels[0] = 4095
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "TIFF"):
        content = encoded(levels, kind, exif=exif)
        assert (decode(content, SIDE, GreyRange(0, 4095))[:, -1] == 255).all()


def test_levels_that_are_not_numbers_are_named():
    levels = np.full((SIDE, SIDE), np.nan, np.float32)
    pixels, reasons = read_pixels([encoded(levels)], 1, SIDE, GreyRange(0, 1))
    assert len(pixels) == 0
    assert reasons == {0: "some of its pixels are not finite numbers"}
    assert find_grey_range([encoded(levels)]) is None


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([np.uint16, np.int32, np.float32]), st.floats(-(2**40), 2**40, width=32)),
        min_size=1,
        max_size=4,
    )
)
def test_every_training_image_lies_within_the_range(found):
    pictures = []
    for kind, value in found:
        bounds = (0, 65535) if kind is np.uint16 else (-(2**31), 2**31 - 1) if kind is np.int32 else (-(2**40), 2**40)
        pictures.append(encoded(np.array([[0, np.clip(value, *bounds)]]).astype(kind)))
    scale = find_grey_range(pictures)
    assert scale is not None
    assert scale.black < scale.white
    for picture in pictures:
        assert decode(picture, 2, scale).dtype == np.uint8
