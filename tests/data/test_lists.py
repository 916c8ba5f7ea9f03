"""Lists of images and labels as people write them; pandas and the standard library write, refilled reads."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import drawn
from refilled.cli.app import app
from refilled.data import load_task
from refilled.data.sources.csv_folder import open_csv_folder
from refilled.errors import RefilledError, TaskError

CLASSES = ("cat", "dog")


def put(root: Path, names: list[str]) -> list[str]:
    """Write pictures whose red says their number; the labels of even and odd numbers differ."""
    for number, name in enumerate(names):
        drawn.put(root / name, drawn.numbered(number))
    return [CLASSES[number % 2] for number in range(len(names))]


@pytest.fixture
def names(tmp_path) -> list[str]:
    names = [f"images/{number:03}.png" for number in range(20)]
    put(tmp_path, names)
    return names


def check(task, classes=CLASSES, count: int = 20) -> None:
    """Check that each picture has the label of its number."""
    assert task.classes == classes
    found = []
    for split in (task.train, task.val, task.test):
        numbers = split.pixels[:, 0, 0, 0].int()
        assert split.labels.tolist() == (numbers % 2).tolist()
        found += numbers.tolist()
    assert sorted(found) == list(range(count))


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, RefilledError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


TRAIN = ["--model", "wrn_10_1", "--epochs", "1", "--threads", "1", "--quiet"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["", "labels.csv"])
def test_a_list_is_trained_on_and_evaluated(tmp_path, names, task):
    photos, out = tmp_path, tmp_path / "run"
    pd.DataFrame({"filename": names, "label": CLASSES * 10}).to_csv(photos / "labels.csv", index=False)
    run("train", photos / task, *TRAIN, "--out", out)
    assert json.loads((out / "model.json").read_text())["classes"] == ["cat", "dog"]
    images = json.loads((out / "result.json").read_text())["data"]["images"]
    assert sum(images.values()) == 20
    assert f"all {images['test']} images" in run("evaluate", out)


WAYS = {
    "pandas with its index": lambda frame, file: frame.to_csv(file),
    "semicolons": lambda frame, file: frame.to_csv(file, sep=";", index=False),
    "tabs": lambda frame, file: frame.to_csv(file, sep="\t", index=False),
    "UTF-8 with a mark": lambda frame, file: frame.to_csv(file, encoding="utf-8-sig", index=False),
    "UTF-16": lambda frame, file: frame.to_csv(file, encoding="utf-16", index=False),
    "UTF-16 without a mark": lambda frame, file: frame.to_csv(file, encoding="utf-16-le", index=False),
    "no header": lambda frame, file: frame.to_csv(file, header=False, index=False),
    "all quoted": lambda frame, file: frame.to_csv(file, quoting=1, index=False),
    "labels first": lambda frame, file: frame[["label", "filename"]].to_csv(file, index=False),
    "labels first, no header": lambda frame, file: frame[["label", "filename"]].to_csv(file, index=False, header=False),
    "unusual header": lambda frame, file: frame.to_csv(file, index=False, header=["Foto", "Tierart"]),
    "capitals": lambda frame, file: frame.to_csv(file, index=False, header=["Image Path", "Class"]),
    "line ends of Windows": lambda frame, file: frame.to_csv(file, index=False, lineterminator="\r\n"),
    "further columns": lambda frame, file: frame.assign(width=8, note="a, b", path="x").to_csv(file, index=False),
    "blanks": lambda frame, file: file.write_text(
        "filename , label\n\n" + "".join(f'  "{name}" ,\t{label} \n\n' for name, label in frame.values)
    ),
    "Excel": lambda frame, file: file.write_text("sep=;\n" + frame.to_csv(sep=";", index=False)),
    "empty cells at the end": lambda frame, file: file.write_text(
        "filename;label;;\n" + "".join(f"{name};{label};;\n" for name, label in frame.values) + ";;;\n;;;\n"
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_lists_are_read_however_they_are_written(tmp_path, names, way):
    WAYS[way](pd.DataFrame({"filename": names, "label": CLASSES * 10}), tmp_path / "labels.csv")
    check(load_task(str(tmp_path)))


@pytest.mark.parametrize(
    "write",
    [
        lambda number: f"{number:03}",
        lambda number: f"{number:03}.png",
        lambda number: f"{number:03}.PNG",
        lambda number: f"./images/{number:03}.png",
        lambda number: f"images\\{number:03}.png",
        lambda number: f"C:\\Users\\me\\photos\\images\\{number:03}.png",
        lambda number: f"/home/me/photos/images/{number:03}.png",
    ],
)
@pytest.mark.parametrize("header", [True, ["name", "class"], False])
def test_names_may_lack_or_have_folders_and_suffixes(tmp_path, names, write, header):
    written = [write(number) for number in range(20)]
    frame = pd.DataFrame({"image": written, "label": CLASSES * 10})
    frame.to_csv(tmp_path / "labels.csv", index=False, header=header)
    check(load_task(str(tmp_path / "labels.csv")))


def test_a_missing_image_never_becomes_another_one_of_that_name(tmp_path):
    put(tmp_path, [f"{folder}/{number}.png" for number in range(10) for folder in "ab"])
    listed = [f"{folder}/{number}.png" for number in range(10) for folder in "ab"]
    (tmp_path / "a/3.png").unlink()
    for start in ("", "D:\\photos\\"):
        pd.DataFrame({"image": [start + name for name in listed], "label": CLASSES * 10}).to_csv(
            tmp_path / "labels.csv", index=False
        )
        with pytest.raises(TaskError, match=r"1 of 20 images cannot be read.*a/3\.png: no such file"):
            load_task(str(tmp_path))
    pd.DataFrame({"image": [name.split("/")[1] for name in listed], "label": CLASSES * 10}).to_csv(
        tmp_path / "labels.csv", index=False
    )
    with pytest.raises(TaskError, match=r"'0\.png' may be a/0\.png or b/0\.png.*write the folder"):
        load_task(str(tmp_path))


def test_a_missing_image_in_the_first_line_is_no_header(tmp_path, names):
    rows = [("images/gone", "cat"), *zip(names, CLASSES * 10, strict=True)]
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False, header=False)
    with pytest.raises(TaskError, match=r"1 of 21 images cannot be read.*images/gone: no such file"):
        load_task(str(tmp_path))


def test_another_encoding_is_reported(tmp_path):
    names = [f"é{number:02}.png" for number in range(20)]
    put(tmp_path, names)
    pd.DataFrame({"file": names, "label": CLASSES * 10}).to_csv(tmp_path / "labels.csv", index=False, encoding="cp1252")
    task = load_task(str(tmp_path))
    check(task)
    assert "labels.csv is not UTF-8 and was read as Windows-1252" in task.notes


def test_a_column_says_the_part(tmp_path, names):
    parts = ["Train", "training set", "VALIDATION", "validation", "test", "Testing"] * 3 + ["train"] * 2
    frame = pd.DataFrame({"filename": names, "label": CLASSES * 10, "split": parts})
    frame.to_csv(tmp_path / "labels.csv", index=False)
    task = load_task(str(tmp_path))
    check(task)
    assert [len(split) for split in (task.train, task.val, task.test)] == [8, 6, 6]
    assert "parts as in column 'split' of labels.csv" in task.notes
    frame.rename(columns={"label": "split", "split": "part"}).to_csv(tmp_path / "other.csv", index=False)
    assert "parts as in column 'part' of other.csv" in load_task(f"{tmp_path / 'other.csv'}@label=split").notes
    frame.assign(split=np.arange(20) % 5).to_csv(tmp_path / "labels.csv", index=False)
    task = load_task(str(tmp_path))
    assert any(
        "'split' of labels.csv names no parts ('0', '1', '2', '3', '4') and was not used" in n for n in task.notes
    )
    assert any("no test part" in note for note in task.notes)
    frame.assign(split=["train", "spare"] * 10).to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(TaskError, match="names parts, but also holds 'spare'"):
        load_task(str(tmp_path))
    frame.assign(split="test").to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(TaskError, match="gives no image to the training part"):
        load_task(str(tmp_path))


def test_a_part_may_be_missing(tmp_path, names):
    frame = pd.DataFrame({"filename": names, "label": CLASSES * 10})
    frame[:12].to_csv(tmp_path / "train.csv", index=False)
    frame[12:].to_csv(tmp_path / "test.csv", index=False)
    task = load_task(str(tmp_path), val=0)
    check(task)
    assert (len(task.train), len(task.test)) == (12, 8)
    frame[12:].rename(columns={"label": "class"}).to_csv(tmp_path / "test.csv", index=False)
    check(load_task(str(tmp_path), val=0))
    frame[12:][["filename"]].to_csv(tmp_path / "test.csv", index=False)
    task = load_task(str(tmp_path))
    assert "test.csv has no column of labels and was not used" in task.notes
    assert any(note.startswith("no test part") for note in task.notes)
    assert (
        "8 images are in no list and were not used: images/012.png, images/013.png, images/014.png, ..." in task.notes
    )
    frame[12:].to_csv(tmp_path / "testing.csv", index=False)
    with pytest.raises(TaskError, match=r"two lists of the test part, test\.csv and testing\.csv"):
        load_task(str(tmp_path))


def test_repetitions_are_reported_and_contradictions_refused(tmp_path, names):
    rows = list(zip(names, CLASSES * 10, strict=True))
    pd.DataFrame([*rows, rows[3], rows[3]], columns=["image", "label"]).to_csv(tmp_path / "labels.csv", index=False)
    task = load_task(str(tmp_path))
    check(task)
    assert "2 rows of labels.csv repeat others and were left out" in task.notes
    again = [*rows, ("003.png", "cat")]
    pd.DataFrame(again, columns=["image", "label"]).to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(TaskError, match=r"images/003\.png is 'dog' in line 5 and 'cat' in line 22"):
        load_task(str(tmp_path))
    pd.DataFrame(rows, columns=["image", "label"]).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame([("003.png", "cat")], columns=["image", "label"]).to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(TaskError, match=r"train\.csv and test\.csv contradict each other: .*003\.png is 'dog'"):
        load_task(str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0, 1], ("0", "1")),
        ([0.0, 1.0], ("0", "1")),
        ([9, 10], ("9", "10")),
        ([False, True], ("False", "True")),
        (["007", "7"], ("007", "7")),
    ],
)
def test_labels_of_any_kind_are_read(tmp_path, names, labels, classes):
    pd.DataFrame({"image": names, "label": labels * 10}).to_csv(tmp_path / "labels.csv", index=False)
    check(load_task(str(tmp_path)), classes)


def test_the_columns_can_be_named(tmp_path, names):
    frame = pd.DataFrame({"id": range(20), "photo": names, "kind": CLASSES * 10, "size": [8, 9] * 10, "score": 0.5})
    frame.to_csv(tmp_path / "labels.csv", index=False)
    advice = r"which column .*labels\.csv holds the labels: it has id, photo, kind, size, score\. Add one of these"
    with pytest.raises(TaskError, match=rf"{advice} to the task: @label=kind \(text\); @label=size \(text\)$"):
        load_task(str(tmp_path / "labels.csv"))
    check(load_task(f"{tmp_path / 'labels.csv'}@label=kind"))
    check(load_task(f"{tmp_path}@label=kind,image=photo"))
    with pytest.raises(TaskError, match="unknown column 'knd'; did you mean 'kind'"):
        load_task(f"{tmp_path}@label=knd")
    with pytest.raises(TaskError, match=r"'id' of .* is not a label: its 20 rows all hold different values"):
        load_task(f"{tmp_path}@label=id")
    frame[["photo", "kind", "size"]].to_csv(tmp_path / "labels.csv", index=False, header=False)
    check(load_task(f"{tmp_path}@label=2"))


def test_a_table_about_class_folders_is_not_taken_for_their_labels(tmp_path):
    names = [f"{CLASSES[number % 2]}/{number}.png" for number in range(20)]
    put(tmp_path, names)
    for columns in ({"text": [f"caption {number}" for number in range(20)]}, {"width": [8, 9] * 10}):
        pd.DataFrame({"file_name": names, **columns}).to_csv(tmp_path / "metadata.csv", index=False)
        check(load_task(str(tmp_path)))
    pd.DataFrame({"file_name": names, "label": ["x", "y"] * 10}).to_csv(tmp_path / "metadata.csv", index=False)
    task = load_task(str(tmp_path))
    check(task, ("x", "y"))
    assert "labels are those of metadata.csv" in task.notes


def test_labels_that_differ_in_case_are_reported(tmp_path, names):
    pd.DataFrame({"image": names, "label": ["A", "a"] * 10}).to_csv(tmp_path / "labels.csv", index=False)
    task = load_task(str(tmp_path))
    assert "labels 'A' and 'a' differ only in case or accents, and are different classes" in task.notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image,label\nimages/000.png\n", r"labels\.csv, line 2: 'images/000\.png' is not a file name and a label"),
        (b"image,label\n,cat\nimages/000.png,dog\n", "line 2: ' cat' is not a file name and a label"),
        (b"image,label\nimages/000.png,cat\n../images/001.png,dog\n", r"line 3: '\.\./images/001\.png' leads out of"),
        (b'image,label\n"images/000.png,cat\nimages/001.png,dog\n', "an earlier quotation mark is not closed"),
        (b"image,label\na.png,cat\nb.png,dog\n", "none of the 2 images .* the first is 'a.png'"),
        (b"no list of images\n", r"none of the 1 image in column '1' of .*labels\.csv is below"),
        (b"", "is empty"),
        (b"image,label\n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\r", "is not text"),
        (b"image,label\nimages/000.png,0.5\nimages/001.png,1\n", "holds fractions such as 0.5"),
    ],
)
def test_lists_that_cannot_be_used_are_explained(tmp_path, names, content, message):
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(TaskError, match=message):
        load_task(str(tmp_path / "labels.csv"))


CELLS = st.sampled_from(["images/000.png", "001", "images\\002.PNG", "C:\\x\\003.png", "cat", "dog", "", "label", "id"])


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=80)
    | st.text(max_size=80).map(lambda text: text.encode(errors="surrogatepass"))
    | st.lists(st.lists(CELLS | st.text(max_size=4), max_size=4).map(",".join), max_size=6).map(
        lambda lines: "\n".join(lines).encode(errors="replace")
    ),
    st.none() | st.sampled_from(["1", "2", "label"]),
)
@example(b"id,label\n/,cat\n001,dog\n", None)
@example(b"\xff\xfe", None)
def test_any_list_gives_a_source_or_an_error_that_a_user_can_fix(tmp_path, content, label):
    if not (tmp_path / "images").exists():
        put(tmp_path, [f"images/{number:03}.png" for number in range(4)])
    (tmp_path / "labels.csv").write_bytes(content)
    try:
        source = open_csv_folder(tmp_path / "labels.csv", None, label)
    except RefilledError:
        return
    parts = [part for part in (source.train, source.val, source.test) if part is not None]
    assert all(0 <= number < len(source.classes) for part in parts for number in part.labels)
    assert all((tmp_path in path.parents) for part in parts for path in part.pictures(np.arange(len(part.labels))))
