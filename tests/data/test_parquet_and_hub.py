"""Tables of images: Parquet in its many shapes, the hub, and CIFAR-100's own files."""

import json
import os
import pickle
import re
import tarfile
from decimal import Decimal
from hashlib import md5
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import drawn
from refilled.cli.app import app
from refilled.data import load_task
from refilled.data.sources import cifar100
from refilled.errors import RefilledError, TaskError


def png(number: int) -> bytes:
    return drawn.png(drawn.numbered(number))


def images(count: int, first: int = 0) -> list[dict[str, object]]:
    return [{"bytes": png(first + number), "path": None} for number in range(count)]


def write(path: Path, columns: dict[str, object], names: list[str] | None = None, **options) -> Path:
    """Write a table; ``names`` become Hugging Face's class names of the column ``label``."""
    table = pa.table(columns)
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


# Parquet


def test_a_folder_of_parts_with_names_in_the_schema(tmp_path):
    write(tmp_path / "train.parquet", {"img": images(12), "label": [0, 1, 2] * 4}, ["ant", "bee", "cow"])
    write(tmp_path / "validation.parquet", {"img": images(3, 50), "label": [0, 1, 2]}, ["ant", "bee", "cow"])
    write(tmp_path / "test.parquet", {"img": images(6, 100), "label": [2, 1, 0] * 2}, ["ant", "bee", "cow"])
    task = load_task(str(tmp_path))
    assert task.classes == ("ant", "bee", "cow")
    assert [len(split) for split in (task.train, task.val, task.test)] == [12, 3, 6]
    assert task.test.labels.tolist() == [2, 1, 0] * 2
    assert task.test.sources[:2] == ("test.parquet#0", "test.parquet#1")
    assert task.test.pixels[:, 0, 0, 0].tolist() == list(range(100, 106))
    assert task.train.labels.tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize("rows", [{"row_group_size": 3}, {"row_group_size": 1000}])
def test_any_rows_are_read_from_shards_and_row_groups(tmp_path, rows):
    for shard in range(3):
        labels = [(100 * shard + row) % 5 for row in range(100)]
        name = f"data/train-{shard:05}-of-00003.parquet"
        write(tmp_path / name, {"image": images(100, 100 * shard), "label": labels}, **rows)
    task = load_task(f"{tmp_path}:1,3", val=0)
    assert len(task.train) + len(task.test) == 120
    for split in (task.train, task.test):
        colours = split.pixels[:, 0, 0, 0].int() + 256 * split.pixels[:, 1, 0, 0].int()
        assert [1 + 2 * label for label in split.labels.tolist()] == [colour % 5 for colour in colours.tolist()]
        assert list(split.sources) == [
            f"train-{colour // 100:05}-of-00003.parquet#{colour % 100}" for colour in colours.tolist()
        ]


@pytest.mark.parametrize(
    ("columns", "classes"),
    [
        ({"label": ["dog", "cat"] * 5}, ("cat", "dog")),
        ({"label": pa.array(["dog", "cat"] * 5).dictionary_encode()}, ("cat", "dog")),
        ({"target": [7, 3] * 5}, ("3", "7")),
        ({"label": [7, 3] * 5, "class_name": ["dog", "cat"] * 5}, ("cat", "dog")),
        ({"label": [1, 0] * 5, "class_name": ["same", "same"] * 5}, ("same", "same")),
        ({"label": [1, 0] * 5, "class_name": list("abcdefghij")}, ("0", "1")),  # no one name for a number
        ({"Target ": [1, 0] * 5}, ("0", "1")),
        ({"other": [1, 0] * 5, "label": pa.array([4, 5] * 5, pa.uint8())}, ("4", "5")),
    ],
)
def test_classes_are_named_as_well_as_the_table_allows(tmp_path, columns, classes):
    assert load_task(str(write(tmp_path / "pets.parquet", {"img": images(10), **columns}))).classes == classes


@pytest.mark.parametrize("content", [["cat", "dog"], {"classes": ["cat", "dog"]}])
def test_names_may_lie_beside_the_table(tmp_path, content):
    (tmp_path / "classes.json").write_text(json.dumps(content))
    assert load_task(str(write(tmp_path / "x.parquet", {"img": images(10), "label": [0, 1] * 5}))).classes == (
        "cat",
        "dog",
    )


def test_images_may_be_plain_bytes_or_files_beside_the_table(tmp_path):
    plain = [image["bytes"] for image in images(10)]
    (tmp_path / "cat.png").write_bytes(png(999))
    both = [*images(9), {"bytes": None, "path": "cat.png"}]
    first = load_task(str(write(tmp_path / "a.parquet", {"picture": plain, "label": [0, 1] * 5})), val=0)
    second = load_task(str(write(tmp_path / "b.parquet", {"picture": both, "label": [0, 1] * 5})), val=0)
    colours = [
        {int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for split in (task.train, task.test) for image in split.pixels}
        for task in (first, second)
    ]
    assert colours == [set(range(10)), {*range(9), 999}]


def test_columns_can_be_chosen(tmp_path):
    columns = {"a": images(10), "b": images(10, 50), "fine": [0, 1] * 5, "coarse": [0] * 5 + [1] * 5}
    path = write(tmp_path / "x.parquet", columns)
    with pytest.raises(
        TaskError, match=r"which column .* holds the images: it has a, b, fine, coarse; add @image=COLUMN"
    ):
        load_task(str(path))
    with pytest.raises(TaskError, match=r"which column .* holds the labels"):
        load_task(f"{path}@image=b")
    with pytest.raises(TaskError, match="unknown column 'course'; did you mean 'coarse'"):
        load_task(f"{path}@image=b,label=course")
    with pytest.raises(TaskError, match="unknown column 'c'"):
        load_task(f"{path}@image=c,label=fine")
    task = load_task(f"{path}@image=b,label=coarse", val=0)
    assert task.name == f"{path}@val=0.0,image=b,label=coarse"
    assert all(
        (int(image[0, 0, 0]) >= 55) == label
        for image, label in zip(task.train.pixels, task.train.labels.tolist(), strict=True)
    )


def test_bad_cells_are_listed(tmp_path):
    cells = [*images(8), {"bytes": None, "path": None}, {"bytes": b"no picture", "path": None}]
    path = write(tmp_path / "x.parquet", {"img": cells, "label": [0, 1] * 5})
    skipped = dict(load_task(str(path), allow_bad=True).skipped)
    assert skipped["x.parquet#8"] == "empty"
    assert skipped["x.parquet#9"].startswith("not a picture")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([0, None] * 5, r"x\.parquet has 5 empty cells among 10"),
        ([0.0, float("nan")] * 5, r"x\.parquet has 5 empty cells among 10"),
        (["a", ""] * 5, "5 empty cells"),
        ([0.5, 1.5] * 5, r"'label' of .*x\.parquet holds fractions such as 0\.5"),
        ([float("inf"), 1.5] * 5, "fractions"),
        ([[0], [1]] * 5, "None of them qualifies"),
        (list(range(10)), "its 10 rows all hold different values"),
        ([0, -1] * 5, "label -1, but names exist only for 0 to 1"),
        ([0, 2] * 5, "label 2, but"),
    ],
)
def test_unusable_labels_are_refused(tmp_path, label, message):
    with pytest.raises(TaskError, match=message):
        load_task(str(write(tmp_path / "x.parquet", {"img": images(10), "label": label}, ["cat", "dog"])))


def test_damaged_and_missing_tables_are_named(tmp_path):
    path = write(tmp_path / "train.parquet", {"img": images(10), "label": [0, 1] * 5})
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(TaskError, match="cannot be read as Parquet"):
            load_task(str(tmp_path))
    write(tmp_path / "train.parquet", {"img": pa.array([], pa.binary()), "label": pa.array([], pa.int64())})
    with pytest.raises(TaskError, match="is empty"):
        load_task(str(tmp_path))
    for name in ("one.parquet", "two.parquet"):
        (tmp_path / name).write_bytes(whole)
    path.unlink()
    with pytest.raises(TaskError, match=r"name one of its files train\.parquet"):
        load_task(str(tmp_path))


def test_damage_inside_a_table_does_not_go_unnoticed(tmp_path):
    path = write(tmp_path / "train.parquet", {"img": images(50), "label": [0, 1] * 25}, compression="none")
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(TaskError):
        load_task(str(tmp_path))


LABELS = st.lists(st.none() | st.integers(-3, 5) | st.integers(-(2**70), 2**70), min_size=1, max_size=12)
OTHERS = st.lists(st.text(max_size=3) | st.none(), min_size=1, max_size=12) | st.lists(st.floats() | st.booleans())


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LABELS | OTHERS, st.none() | st.lists(st.text(max_size=3), max_size=4))
@example([0, 1], ["\ud800", ""])
def test_any_labels_give_a_task_or_an_error_that_a_user_can_fix(tmp_path, labels, names):
    try:
        table = {"img": images(len(labels)), "label": pa.array(labels)}
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return  # no such column can be written
    path = write(tmp_path / "x.parquet", table, names)
    try:
        task = load_task(str(path))
    except RefilledError:
        return
    assert len(task.train) + len(task.val) + len(task.test) == len(labels)


# Which column holds the labels, and whether the files agree on them


@pytest.mark.slow
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([False, True], ("False", "True")),
        ([0.0, 1.0], ("0", "1")),
        (["cat", "dog"], ("cat", "dog")),
        (pd.Categorical(["cat", "dog"] * 10), ("cat", "dog")),
        (pd.Categorical([4, 2] * 10), ("2", "4")),
        (np.array([3, 1] * 10, np.uint8), ("1", "3")),
        (np.array([3, 1] * 10, np.float16), ("1", "3")),
        ([Decimal(5), Decimal(6)], ("5", "6")),
    ],
)
def test_an_integer_column_is_not_the_label_just_because_no_other_is_left(tmp_path, labels, classes):
    """The error names what can be the label, with words that work; image_id and the scores cannot be."""
    file, out = tmp_path / "train.parquet", tmp_path / "run"
    frame = pd.DataFrame({"image": images(20), "image_id": range(20), "score": [0.5, 1.0] * 10})
    for name in ("is_cat", "label"):
        frame.assign(**{name: labels * 10 if isinstance(labels, list) else labels}).to_parquet(file)
        if name == "is_cat":
            with pytest.raises(TaskError) as refused:
                load_task(str(file))
            found = re.findall(r"@\w+=\w+", str(refused.value))
            assert found == ["@label=is_cat"]
            task = load_task(f"{file}{found[0]}")
        else:
            task = load_task(str(file))
        assert task.classes == classes
        expected = {f"train.parquet#{row}": classes.index(str(value).removesuffix(".0"))
                    for row, value in enumerate(pd.read_parquet(file)[name])}  # fmt: skip
        for split in (task.train, task.val, task.test):
            assert [expected[source] for source in split.sources] == split.labels.tolist()
    command = [
        "train",
        str(file),
        "--model",
        "wrn_10_1",
        "--epochs",
        "1",
        "--threads",
        "1",
        "--quiet",
        "--out",
        str(out),
    ]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert json.loads((out / "model.json").read_text())["classes"] == list(classes)


def test_a_class_label_is_a_label_whatever_its_name(tmp_path):
    features = datasets.Features(
        picture=datasets.Image(), n=datasets.Value("int64"), breed=datasets.ClassLabel(2, ["x", "a"])
    )
    columns = {"picture": images(10), "n": [1, 2] * 5, "breed": [0, 1] * 5}
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "train.parquet")
    assert load_task(str(tmp_path)).classes == ("x", "a")


def two_files(
    folder: Path, first: dict, second: dict, names=(None, None), files=("train.parquet", "test.parquet")
) -> str:
    for file, columns, known in zip(files, (first, second), names, strict=True):
        write(folder / file, {"img": images(6), **columns}, known)
    return str(folder)


@pytest.mark.parametrize("files", [("train.parquet", "test.parquet"), ("train-0.parquet", "train-1.parquet")])
@pytest.mark.parametrize(
    ("first", "second", "names", "message"),
    [
        ({"label": [0, 1] * 3}, {"other": [0, 1] * 3}, (None, None), r"{1}: unknown column 'label'"),
        ({"other": [0, 1] * 3}, {"label": [0, 1] * 3}, (None, None), r"{0}: unknown column 'label'"),
        ({"label": [0, 1] * 3}, {"label": [0, 1] * 3}, (["a", "b"], ["b", "a"]),
         r"{0} and .*{1} contradict each other: in column 'label', label 0 is 'a' in the first and 'b' in the second"),
        ({"label": [0, 1] * 3}, {"label": ["a", "b"] * 3}, (None, None),
         r"'label' holds integers in .*{0}, but text in .*{1}"),
        ({"label": [0, 1] * 3}, {"label": [True, False] * 3}, (None, None), r"integers in .*{0}, but true or false in"),
        ({"label": [0, 1] * 3}, {"label": [0, None] * 3}, (None, None), r"{1} has 3 empty cells among 6"),
        ({"label": [0, 1] * 3}, {"label": [0, 0.5] * 3}, (None, None), r"{1} holds fractions"),
        ({"label": [0, 1] * 3, "class_name": ["a", "b"] * 3}, {"label": [0, 1] * 3, "class_name": ["b", "a"] * 3},
         (None, None), r"{0} and .*{1} contradict"),
        ({"label": [0, 1] * 3}, {"label": [0, 1] * 3, "img": [1, 2] * 3}, (None, None),
         r"'img' of .*{1} holds int64, not images"),
    ],
)  # fmt: skip
def test_files_that_contradict_each_other_are_named(tmp_path, files, first, second, names, message):
    with pytest.raises(TaskError, match=message.format(*map(re.escape, files))):
        load_task(two_files(tmp_path, first, second, names, files))


@pytest.mark.parametrize(
    "second",
    [
        pa.array([0, 1, 2] * 2, pa.int16()),
        pa.array([0.0, 1.0, 2.0] * 2),
        pa.array([0, 1, 2] * 2).dictionary_encode(),
    ],
)
def test_files_may_write_equal_labels_in_other_types_and_know_more_names(tmp_path, second):
    first = pa.array([1, 0] * 3, pa.int64())
    task = load_task(two_files(tmp_path, {"label": first}, {"label": second}, (None, ["a", "b", "c"]),
                               ("train-0.parquet", "train-1.parquet")), val=0)  # fmt: skip
    assert task.classes == ("a", "b", "c")


def test_a_single_table_may_say_the_part_of_each_row(tmp_path):
    parts = ["train"] * 8 + ["validation"] * 4 + ["test"] * 8
    frame = pd.DataFrame({"image": images(20), "label": [0, 1] * 10, "split": parts})
    frame.sample(frac=1, random_state=0).to_parquet(tmp_path / "pets.parquet")
    task = load_task(str(tmp_path / "pets.parquet"))
    assert [len(split) for split in (task.train, task.val, task.test)] == [8, 4, 8]
    assert sorted(task.test.pixels[:, 0, 0, 0].tolist()) == list(range(12, 20))
    assert (task.test.pixels[:, 0, 0, 0] % 2).tolist() == task.test.labels.tolist()


# The layouts of the hub


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("default/train/0000.parquet", "default/validation/0000.parquet", "default/test/0000.parquet"),
        ("default/partial-train/0000.parquet", "default/partial-val/0000.parquet", "default/partial-test/0.parquet"),
        (
            "data/train-00000-of-00001-b42.parquet",
            "data/dev-00000-of-00001.parquet",
            "data/test-00000-of-00001.parquet",
        ),
        ("pets/train-00000-of-00001.parquet", "pets/valid-0.parquet", "pets/test-0.parquet"),
        ("train/0000.parquet", "validation/0000.parquet", "test/0000.parquet"),
        ("data/train/0.PARQUET", "data/val/0.PARQUET", "data/test/0.PARQUET"),
        ("pets_train.parquet", "pets_dev.parquet", "pets_test.parquet"),
    ],
)
def test_the_layouts_of_the_hub_are_read(tmp_path, train, val, test):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    for name, first, count in ((train, 0, 12), (val, 20, 4), (test, 40, 6)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        rows = {"image": images(count, first), "label": [0, 1] * (count // 2)}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / name)
    (tmp_path / "README.md").write_text("pets")
    task = load_task(str(tmp_path))
    assert task.classes == ("cat", "dog")
    for split, name in ((task.train, train), (task.val, val), (task.test, test)):
        rows = pd.read_parquet(tmp_path / name)
        expected = [Image.open(BytesIO(image["bytes"])).getpixel((0, 0))[0] for image in rows["image"]]
        assert split.pixels[:, 0, 0, 0].tolist() == expected
        assert split.labels.tolist() == rows["label"].tolist()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["a/train/0.parquet", "b/train/0.parquet"],
            r"holds several configurations .*\(a, b\); give one as the task, .*a$",
        ),
        (
            ["train.parquet", "val.parquet", "validation.parquet"],
            "two kinds of files for the val part, 'val' and 'valid",
        ),
        (["train.parquet", "more.parquet"], r"more\.parquet belongs to no part"),
    ],
)
def test_ambiguous_layouts_are_refused(tmp_path, files, message):
    for file in files:
        write(tmp_path / file, {"img": images(6), "label": [0, 1] * 3})
    with pytest.raises(TaskError, match=message):
        load_task(str(tmp_path))
    if "configurations" in message:
        assert len(load_task(str(tmp_path / "a")).train) > 0


def test_a_table_within_class_folders_does_not_hide_them(tmp_path):
    for number in range(10):
        (tmp_path / "train" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "ab"[number % 2] / f"{number}.png").write_bytes(png(number))
    for place in ("train/metadata.parquet", "train/a/notes.parquet", "metadata.parquet"):
        write(tmp_path / place, {"file_name": ["x"]})
    assert load_task(str(tmp_path)).classes == ("a", "b")


# The hub


def test_the_hub_is_read_through_datasets(monkeypatch):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    parts = {
        part: datasets.Dataset.from_dict({"image": images(count, first), "label": [0, 1] * (count // 2)}, features)
        for part, count, first in (("train", 20, 0), ("validation", 4, 100), ("test", 6, 200))
    }
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda name: asked.append(name) or datasets.DatasetDict(parts))
    task = load_task("hub:someone/pets")
    assert asked == ["someone/pets"]
    assert (task.name, task.classes) == ("hub:someone/pets", ("cat", "dog"))
    assert task.test.pixels[:, 0, 0, 0].tolist() == list(range(200, 206))
    assert task.test.labels.tolist() == [0, 1] * 3
    assert task.val.sources[1] == "someone/pets/validation#1"
    with pytest.raises(TaskError, match="unknown column 'lable'; did you mean 'label'"):
        load_task("hub:someone/pets@label=lable")
    other = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["dog", "cat"]))
    parts["test"] = datasets.Dataset.from_dict({"image": images(4), "label": [0, 1] * 2}, other)
    with pytest.raises(TaskError, match=r"pets/train and hub:someone/pets/test contradict each other"):
        load_task("hub:someone/pets")


def test_a_column_of_the_hub_is_not_a_label_just_because_no_other_is_left(monkeypatch):
    columns = {"image": images(8), "image_id": range(8), "is_cat": [True, False] * 4}
    features = datasets.Features(
        image=datasets.Image(), image_id=datasets.Value("int64"), is_cat=datasets.Value("bool")
    )
    table = datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features))
    monkeypatch.setattr("datasets.load_dataset", lambda name: table)
    with pytest.raises(TaskError, match=r"Add one of these to the task: @label=is_cat \(bool\)$"):
        load_task("hub:someone/pets")
    assert load_task("hub:someone/pets@label=is_cat").classes == ("False", "True")


@pytest.mark.parametrize("error", [ConnectionError("no route"), FileNotFoundError("no such data set"), ValueError()])
def test_an_unreachable_hub_is_reported(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(TaskError, match=r"hub:someone/pets could not be loaded .* download its Parquet files"):
        load_task("hub:someone/pets")


def test_a_hub_data_set_without_a_training_part_is_refused(monkeypatch):
    parts = datasets.DatasetDict(test=datasets.Dataset.from_dict({"label": [0]}))
    monkeypatch.setattr("datasets.load_dataset", lambda name: parts)
    with pytest.raises(TaskError, match="no training part; it has test"):
        load_task("hub:someone/pets")


# CIFAR-100's own files

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 3072)).astype(np.uint8)


def write_cifar(folder: Path, **changes) -> Path:
    """Write CIFAR-100's own files, small."""
    labels = [number % 4 for number in range(40)]
    folder.mkdir(parents=True)
    content = {b"data": PIXELS, b"fine_labels": labels, b"coarse_labels": labels, b"filenames": [b"x.png"] * 40}
    for part in ("train", "test"):
        (folder / part).write_bytes(pickle.dumps({**content, **changes}, protocol=2))
    names = {b"fine_label_names": [b"apple", b"bear", b"cup", b"dog"]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return folder


@pytest.mark.parametrize("place", ["cifar100/cifar-100-python", "cifar-100-python"])
def test_the_authors_files_are_read(tmp_path, place):
    write_cifar(tmp_path / place)
    task = load_task("cifar100:bear,dog", data_root=tmp_path, val=0)
    assert task.classes == ("bear", "dog")
    assert task.image_size == 32
    assert task.train.sources[:2] == ("train#1", "train#3")
    assert np.array_equal(task.test.pixels.numpy(), PIXELS.reshape(40, 3, 32, 32)[1::2])


class Gadget:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("where", ["data", "key", "whole"])
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, where):
    gadget = Gadget(tmp_path / "canary")
    folder = write_cifar(tmp_path / "cifar-100-python", **({"data": gadget} if where == "data" else {}))
    if where != "data":
        (folder / "train").write_bytes(pickle.dumps(gadget if where == "whole" else {gadget: 1}))
    with pytest.raises(TaskError, match=r"is not a file of CIFAR-100.*it refers to posix"):
        load_task("cifar100", data_root=tmp_path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({b"data": PIXELS[:, :100]}, "do not match its images or class names"),
        ({b"data": PIXELS.astype(float)}, "does not hold"),
        ({b"data": [1, 2]}, "does not hold"),
        ({b"fine_labels": [99] * 40}, "do not match its images or class names"),
        ({b"fine_labels": ["x"] * 40}, "do not match its images"),
        ({b"fine_labels": 7}, "does not hold"),
        ({b"data": [[1], [2, 3]]}, "does not hold"),
    ],
)
def test_other_contents_are_refused(tmp_path, changes, message):
    write_cifar(tmp_path / "cifar-100-python", **{key.decode(): value for key, value in changes.items()})
    with pytest.raises(TaskError, match=message):
        load_task("cifar100", data_root=tmp_path)


def test_damaged_pickles_are_refused(tmp_path):
    folder = write_cifar(tmp_path / "cifar-100-python")
    whole = (folder / "train").read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], pickle.dumps([1, 2])):
        (folder / "train").write_bytes(content)
        with pytest.raises(TaskError, match="is not a file of CIFAR-100"):
            load_task("cifar100", data_root=tmp_path)


def test_a_download_is_checked_and_only_the_known_files_leave_the_archive(tmp_path, monkeypatch):
    write_cifar(tmp_path / "made" / "cifar-100-python")
    archive = tmp_path / "served" / "cifar-100-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(tmp_path / "made" / "cifar-100-python", "cifar-100-python")
        opened.add(tmp_path / "made" / "cifar-100-python" / "meta", "../../escaped")
    monkeypatch.setattr(cifar100, "URL", archive.as_uri())
    monkeypatch.setattr(cifar100, "MD5", "0" * 32)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(TaskError, match="could not be downloaded"):
        load_task("cifar100", data_root=tmp_path / "root")
    monkeypatch.setattr(cifar100, "MD5", md5(archive.read_bytes()).hexdigest())
    assert len(load_task("cifar100", data_root=tmp_path / "root").classes) == 4
    assert sorted(path.name for path in (tmp_path / "root" / "cifar100").rglob("*")) == [
        "cifar-100-python",
        "meta",
        "test",
        "train",
    ]
    assert not list(tmp_path.rglob("escaped"))


def test_without_a_network_it_is_explained_how_to_get_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TaskError, match=r"download https://www\.cs\.toronto\.edu/.*unpack it to"):
        load_task("cifar100", data_root=tmp_path)
