"""CUB-200-2011 from a small tree in its official layout, and test parts that are cut anew."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refilled.data import load_task, task_size
from refilled.data.decode import decode
from refilled.data.source import ArrayPart, Crop, MergedPart
from refilled.errors import TaskError

CLASSES, IMAGES = 4, 10  # of each class, 6 of them to train on


@pytest.fixture
def home(tmp_path) -> Path:
    """Images that are blue without, and of the class's own red within, a box of 30x10 pixels."""
    home = tmp_path / "cub" / "CUB_200_2011"
    lines = {name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes")}
    number = 0
    for label in range(CLASSES):
        name = f"{label + 1:03}.Bird_{'DCBA'[label]}"
        (home / "images" / name).mkdir(parents=True)
        for index in range(IMAGES):
            number += 1
            pixels = np.zeros((40, 60, 3), dtype=np.uint8)
            pixels[..., 2] = 200
            pixels[10:20, 5:35] = (50 * label + index, 0, 0)
            Image.fromarray(pixels).save(home / "images" / name / f"{index}.png")
            lines["images"].append(f"{number} {name}/{index}.png")
            lines["image_class_labels"].append(f"{number} {label + 1}")
            lines["train_test_split"].append(f"{number} {int(index < 6)}")
            lines["bounding_boxes"].append(f"{number} 5.0 10.0 30.0 10.0")
    lines["classes"] = [f"{label + 1} {label + 1:03}.Bird_{'DCBA'[label]}" for label in range(CLASSES)]
    for table, content in lines.items():
        (home / f"{table}.txt").write_text("\n".join(content) + "\n")
    return home


def test_the_official_split_and_order_of_classes_are_kept(home):
    task = load_task("cub", data_root=home.parents[1], val=0, image_size=16)
    assert task.classes == ("Bird D", "Bird C", "Bird B", "Bird A")  # the authors' order, whatever it is
    assert (len(task.train), len(task.test)) == (CLASSES * 6, CLASSES * 4)
    assert all(int(Path(source).stem) < 6 for source in task.train.sources)
    assert all(int(Path(source).stem) >= 6 for source in task.test.sources)
    assert task.name == "cub@val=0.0,size=16"


def test_an_image_is_its_bounding_box_and_nothing_else(home):
    task = load_task("cub", data_root=home.parents[1], val=0, image_size=16)
    assert task.train.pixels.shape[-2:] == (16, 16)
    assert not task.train.pixels[:, 1:].any()  # the blue is outside the box, on all sides
    reds = 50 * task.train.labels + torch.tensor([int(Path(source).stem) for source in task.train.sources])
    assert torch.equal(task.train.pixels[:, 0].flatten(1).unique(dim=1).squeeze(1).long(), reds)


def test_a_crop_is_scaled_as_a_whole_and_ends_at_the_border(tmp_path):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 20:] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    whole = decode(Crop(tmp_path / "a.png", (-5, -5, 100, 100)), 20)
    assert whole[:, :9].max() == 0  # both halves are there: nothing was cut off to make a square
    assert whole[:, 11:].min() == 255
    with pytest.raises(Exception, match="lies outside the picture"):
        decode(Crop(tmp_path / "a.png", (50, 0, 60, 10)), 20)


def test_the_papers_70_to_30_takes_from_all_images_of_each_class(home):
    task = load_task("cub:2-3@test=0.3", data_root=home.parents[1], val=0, image_size=16)
    assert torch.bincount(task.train.labels).tolist() == [7, 7]
    assert torch.bincount(task.test.labels).tolist() == [3, 3]
    assert not set(task.train.sources) & set(task.test.sources)
    assert any("30% of the images of each class" in note for note in task.notes)
    again = load_task(task.name, data_root=home.parents[1])
    assert again.fingerprint == task.fingerprint
    other = load_task("cub:2-3@test=0.3,seed=1", data_root=home.parents[1], val=0, image_size=16)
    assert other.test.sources != task.test.sources


def test_teacher_and_student_of_the_easy_split_share_no_class(home):
    halves = [
        load_task(f"cub:{half}@test=0.3", data_root=home.parents[1], image_size=16)
        for half in ("random-half", "other-half")
    ]
    assert set(halves[0].classes) | set(halves[1].classes) == {"Bird A", "Bird B", "Bird C", "Bird D"}
    assert not set(halves[0].classes) & set(halves[1].classes)


@pytest.mark.parametrize("text", ["cub", "cub:0-1@shots=3", "cub@test=0.3", "digits:0-4@shots=7", "digits"])
def test_the_size_of_a_task_is_known_before_it_is_loaded(home, text):
    task = load_task(text, data_root=home.parents[1])
    size = task_size(text, data_root=home.parents[1])
    assert (size.class_names, size.image_size, size.augmentation) == (task.classes, task.image_size, task.augmentation)
    assert (size.train, size.val, size.test) == (len(task.train), len(task.val), len(task.test))
    assert size.images_per_second > 0


def test_pooled_parts_keep_rows_names_and_pictures_together():
    parts = tuple(
        ArrayPart(np.arange(n), np.full((n, 2, 2), n, dtype=np.uint8) + np.arange(n)[:, None, None], f"part{n}")
        for n in (3, 1, 4)
    )
    pooled = MergedPart(parts)
    rows = np.array([0, 2, 3, 5, 7])
    assert pooled.labels.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert [pooled.name(row) for row in rows.tolist()] == ["part3#0", "part3#2", "part1#0", "part4#1", "part4#3"]
    assert [int(picture[0, 0]) for picture in pooled.pictures(rows)] == [3, 5, 1, 5, 7]


def test_missing_birds_are_reported_once_with_where_to_get_and_put_them(tmp_path):
    with pytest.raises(TaskError) as raised:
        load_task("cub", data_root=tmp_path)
    for said in ("data.caltech.edu", str(tmp_path / "cub" / "CUB_200_2011"), "REFILLED_DATA", "checked", "MD5"):
        assert said in str(raised.value)


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("image_class_labels", "1 1\n", "list different images"),
        ("bounding_boxes", "1 1 1 1\n", "without exactly 5 fields"),
        ("classes", None, "cannot be read"),
        ("train_test_split", "\n".join(f"{n} 2" for n in range(1, 41)), "unknown class or part"),
        ("bounding_boxes", "\n".join(f"{n} a 1 2 3" for n in range(1, 41)), "not four numbers"),
    ],
)
def test_damaged_tables_are_named(home, table, content, message):
    path = home / f"{table}.txt"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(TaskError, match=message):
        load_task("cub", data_root=home.parents[1])


def test_a_missing_picture_is_left_out_with_a_reason(home):
    for folder in (home / "images").iterdir():
        (folder / "0.png").write_bytes(b"")
    with pytest.raises(TaskError, match=r"4 of 40 images cannot be read.*0\.png: empty"):
        load_task("cub", data_root=home.parents[1], image_size=16)


@pytest.mark.parametrize("fraction", ["0", "1", "nan"])
def test_a_test_part_is_a_fraction(fraction):
    with pytest.raises(TaskError, match="is not a fraction to test on"):
        load_task(f"digits@test={fraction}")
