"""Layouts of folders as people have them: recognised or refused, and no picture or class disappears."""

import json
from pathlib import Path

import pytest
from PIL import Image, features
from typer.testing import CliRunner

from drawn import folder, picture, put
from refilled.cli.app import app
from refilled.data import load_task
from refilled.data.decode import read_pixels
from refilled.errors import TaskError

TRAIN = ["--model", "mobilenet_0.25", "--epochs", "1", "--threads", "1", "--quiet"]


def refilled(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def fill(root: Path, classes: tuple[str, ...] = ("cat", "dog"), images: int = 10, seed: int = 0) -> Path:
    return folder(root, dict.fromkeys(classes, images), seed=seed)


def parts(root: Path) -> tuple[tuple[str, ...], int, int, int]:
    task = load_task(str(root))
    return task.classes, len(task.train), len(task.val), len(task.test)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("training_set", "valid", "test_set"),
        ("Train", "Dev", "Holdout"),
        ("train-images", "validation set", "Testing"),
        ("trainset", "eval", "test-data"),
    ],
)
def test_parts_have_the_names_that_people_give_them(tmp_path, train, val, test):
    for place, (part, images) in enumerate({train: 10, val: 3, test: 5}.items()):
        fill(tmp_path / part, images=images, seed=place)
    assert parts(tmp_path) == (("cat", "dog"), 20, 6, 10)


@pytest.mark.slow
def test_dev_beside_train_is_the_val_part(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "dev", images=4, seed=1)
    refilled("train", tmp_path, *TRAIN, "--out", tmp_path / "r")
    assert json.loads((tmp_path / "r" / "result.json").read_text())["data"]["images"]["val"] == 8


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "val", "validation"), "2 folders for the val part: val, validation"),
        (("valid", "test"), "has the parts test, valid, but none named train with class folders"),
    ],
)
def test_unclear_parts_are_refused(tmp_path, folders, message):
    for place, part in enumerate(folders):
        fill(tmp_path / part, seed=place)
    with pytest.raises(TaskError, match=message):
        refilled("train", tmp_path, *TRAIN, "--out", tmp_path / "r")


def test_parts_without_classes_are_not_classes(tmp_path):
    fill(tmp_path, ("train", "test"))
    with pytest.raises(TaskError, match="named after parts, but have no class folders"):
        load_task(str(tmp_path))


def test_a_class_may_still_be_called_train(tmp_path):
    assert parts(fill(tmp_path, ("bus", "train")))[0] == ("bus", "train")


@pytest.mark.parametrize("inner", ["dataset/train", "images"])
def test_one_level_too_high_says_which_folder_to_give(tmp_path, inner):
    fill(tmp_path / inner)
    if inner == "dataset/train":
        fill(tmp_path / "dataset" / "test", seed=1)
    with pytest.raises(TaskError, match=rf"contains only one folder.*give {tmp_path / inner.split('/')[0]} instead"):
        load_task(str(tmp_path))


def test_one_level_too_deep_is_refused(tmp_path):
    for source in ("camera1", "camera2"):
        fill(tmp_path / source)
    with pytest.raises(TaskError, match=r"\(camera1, camera2\) all contain the same folders \('cat', 'dog'\)"):
        load_task(str(tmp_path))


def test_one_inner_folder_per_class_is_fine(tmp_path):
    for seed, name in enumerate(("cat", "dog")):
        fill(tmp_path / name, ("images",), seed=seed)
    assert parts(tmp_path)[0] == ("cat", "dog")


def test_folders_beside_train_are_named(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "extra", seed=1)
    assert "folders next to train that are not used: extra" in load_task(str(tmp_path)).notes


@pytest.mark.slow
@pytest.mark.parametrize("flat", [6, 0])
def test_a_test_part_without_labels_is_no_part(tmp_path, flat):
    fill(tmp_path / "d" / "train", images=12)
    (tmp_path / "d" / "test").mkdir()
    for number in range(flat):
        put(tmp_path / "d" / "test" / f"{number}.png", picture(number))
    said = refilled("train", tmp_path / "d", *TRAIN, "--out", tmp_path / "r")
    assert "nan" not in said
    text = (tmp_path / "r" / "result.json").read_text()
    assert "NaN" not in text
    notes = " ".join(json.loads(text)["data"]["notes"])
    assert ("its 6 images have no labels" if flat else "it is empty") in notes
    assert "were cut off for it" in notes
    assert "nan" not in refilled("evaluate", tmp_path / "r")
    few = ["--methods", "vanilla", "--student", "mobilenet_0.25", "--seeds", 2, "--epochs", 1, "--threads", 1]
    refilled("compare", tmp_path / "d", *few, "--out", tmp_path / "c")


def test_classes_of_one_picture_cannot_be_tested_which_is_reported_at_once(tmp_path):
    fill(tmp_path, images=1)
    with pytest.raises(TaskError, match="there are no images to test on"):
        load_task(str(tmp_path))


@pytest.mark.parametrize("suffix", ["avif", "jp2"])
def test_formats_that_pillow_reads_are_read(tmp_path, suffix):
    if not features.check({"avif": "avif", "jp2": "jpg_2000"}[suffix]):
        pytest.skip(f"this Pillow does not read {suffix}")
    fill(tmp_path)
    folder(tmp_path, {"cat": 6, "dog": 6}, seed=1, suffix=suffix)
    assert sum(parts(tmp_path)[1:]) == 32
    (tmp_path / f"cat/00.{suffix}").rename(tmp_path / "cat" / "20.jpg")  # the content decides
    assert sum(parts(tmp_path)[1:]) == 32


def test_pictures_that_are_not_read_are_counted_by_suffix(tmp_path):
    fill(tmp_path)
    for number in range(3):
        (tmp_path / "cat" / f"{number}.psd").write_bytes(b"8BPS")
    (tmp_path / "dog" / "x.cr2").write_bytes(b"II*\0")
    (note,) = [note for note in load_task(str(tmp_path)).notes if "were not read" in note]
    assert note.startswith("4 files look like pictures and were not read: 1 .cr2, 3 .psd")
    (tmp_path / "only").mkdir()
    for name in ("a", "b"):
        (tmp_path / "only" / name).mkdir()
        (tmp_path / "only" / name / "x.psd").write_bytes(b"8BPS")
    with pytest.raises(TaskError, match=r"no images were found.*2 \.psd"):
        load_task(str(tmp_path / "only"))


def test_pictures_without_a_suffix_are_read(tmp_path):
    fill(tmp_path)
    for path in sorted(tmp_path.rglob("*.png"))[::2]:
        path.rename(path.with_suffix(""))
    (tmp_path / "cat" / "README").write_text("no picture")
    assert sum(parts(tmp_path)[1:]) == 20


def test_a_class_folder_is_a_class_whatever_its_name(tmp_path):
    assert parts(fill(tmp_path, ("v1.png", "logo.tif", "cat")))[0] == ("cat", "logo.tif", "v1.png")


@pytest.mark.slow
def test_thumbnails_and_hidden_files_are_skipped_by_every_command(tmp_path):
    fill(tmp_path / "d")
    for hidden in ("@eaDir/00.png/SYNOPHOTO_THUMB_M.jpg", "._00.png", ".thumbnails/x.png", "__MACOSX/cat/00.png"):
        path = tmp_path / "d" / "cat" / hidden
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\x16\7")
    refilled("train", tmp_path / "d", *TRAIN, "--out", tmp_path / "r")
    rows = refilled("predict", tmp_path / "r", tmp_path / "d", "--csv").splitlines()
    assert len(rows) == 1 + 20


@pytest.mark.slow
def test_the_flag_that_the_message_names_exists(tmp_path):
    fill(tmp_path / "d")
    (tmp_path / "d" / "cat" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0" + b"x" * 50)
    with pytest.raises(TaskError, match="leave them out with --allow-bad"):
        refilled("train", tmp_path / "d", *TRAIN, "--out", tmp_path / "r")
    refilled("train", tmp_path / "d", *TRAIN, "--allow-bad", "--out", tmp_path / "r")
    assert len(json.loads((tmp_path / "r" / "result.json").read_text())["data"]["skipped"]) == 1
    refilled("evaluate", tmp_path / "r")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["https://x.org/cat.jpg", "-"])
def test_what_is_not_a_file_is_refused_before_anything_is_printed(tmp_path, name):
    fill(tmp_path / "d")
    refilled("train", tmp_path / "d", *TRAIN, "--out", tmp_path / "r")
    with pytest.raises(TaskError, match="is not a file; download what it names"):
        refilled("predict", tmp_path / "r", "--", name)


@pytest.mark.slow
def test_photographs_of_108_megapixels_are_read_and_bombs_are_not(tmp_path, monkeypatch):
    Image.new("RGB", (12000, 9000), (200, 10, 10)).save(tmp_path / "large.jpg", quality=30)
    Image.new("L", (10000, 9000)).save(tmp_path / "large.png")
    files = [tmp_path / "large.jpg", tmp_path / "large.png"]
    pixels, reasons = read_pixels(files, 2, 16)
    assert len(pixels) == 1
    assert abs(int(pixels[0, 0, 0, 0]) - 200) < 4
    assert reasons == {1: "too large: 10000x9000, over 80 million pixels; REFILLED_MAX_MEGAPIXELS raises the limit"}
    monkeypatch.setenv("REFILLED_MAX_MEGAPIXELS", "90")
    assert read_pixels(files, 2, 16)[1] == {}
