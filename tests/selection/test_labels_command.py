"""The command ``labels``, as people use it: wrong labels and copies that were put in on purpose."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.errors import RefilledError
from refilled.selection.doubtful import held_out_probabilities
from refilled.selection.measures import deal_folds

LETTERS = ("--teacher", "refilled/letters", "--threads", 1)


def refilled(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Keep the embeddings of these tests apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFILLED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def picture(seed: int, side: int = 40) -> Image.Image:
    """Draw a smooth random picture, as unlike others as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def folder_of(root, parts: dict[str, dict[str, int]]):
    """Write this number of pictures per part and class; each is different."""
    seed = 0
    for part, classes in parts.items():
        for name, count in classes.items():
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                picture(seed := seed + 1).save(root / part / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    """A thousand handwritten digits in class folders, 5 % of them in a wrong one; return the folder and which."""
    root, chance = tmp_path_factory.mktemp("digits"), np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    wrong = set(chance.choice(1000, 50, replace=False).tolist())
    for number in range(10):
        (root / str(number)).mkdir()
    for row in range(1000):
        label = (labels[row] + chance.integers(1, 10)) % 10 if row in wrong else labels[row]
        pixels = (images[row].reshape(8, 8) * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC).save(root / str(label) / f"{row}.png")
    return root, wrong, labels


@pytest.mark.slow
def test_most_of_the_wrong_labels_are_ranked_first_and_corrected(flipped):
    root, wrong, labels = flipped
    found = json.loads(refilled("labels", root, *LETTERS, "--with-test", "--json").stdout)
    assert found["judged"] > 900
    doubts = found["doubts"]
    scores = [doubt["score"] for doubt in doubts]
    assert scores == sorted(scores)
    assert len(doubts) <= 75
    rows = [int(doubt["place"]["image"].split("/")[1].removesuffix(".png")) for doubt in doubts]
    hits = [row for row in rows[:50] if row in wrong]
    assert len(hits) > 25  # 5 % of the images are wrong: by chance, 2 or 3
    assert sum(row in wrong for row in rows[:20]) >= 16
    right = [int(doubt["suggested"]) == labels[row] for doubt, row in zip(doubts, rows, strict=True) if row in wrong]
    assert sum(right) > 0.75 * len(right)
    parts = {doubt["place"]["part"] for doubt in doubts}
    assert parts == {"train", "test"}
    alone = json.loads(refilled("labels", root, *LETTERS, "--json").stdout)
    assert {doubt["place"]["part"] for doubt in alone["doubts"]} == {"train"}
    assert alone["judged"] < found["judged"]


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """Three classes of different pictures in two parts, and copies of some of them."""
    root = folder_of(
        tmp_path_factory.mktemp("copies"), {"train": dict.fromkeys("abc", 12), "test": dict.fromkeys("abc", 4)}
    )
    train, test = root / "train", root / "test"
    shutil.copy(train / "a" / "0.png", train / "b" / "exact.png")
    Image.open(train / "b" / "1.png").save(train / "b" / "encoded.jpg", quality=75)
    Image.open(train / "c" / "2.png").resize((61, 61)).save(test / "c" / "resized.png")
    shutil.copy(train / "c" / "3.png", test / "c" / "same.png")
    moved = Image.open(train / "a" / "4.png").transform((40, 40), Image.Transform.AFFINE, (1, 0, 1, 0, 1, -1))
    moved.save(train / "a" / "moved.png")
    recoloured = np.asarray(Image.open(train / "a" / "5.png"))[..., ::-1].astype(np.int64) // 2 + [90, 0, 0]
    Image.fromarray(recoloured.astype(np.uint8)).save(train / "a" / "recoloured.png")
    return root


def test_copies_are_found_and_those_across_parts_come_first(copied, tmp_path):
    shown = refilled("labels", copied, *LETTERS, "--image-size", 40, "--out", tmp_path / "l.csv").stdout
    assert "5 groups of near copies, 2 across parts, 1 with different labels." in " ".join(shown.split())
    with (tmp_path / "l.csv").open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["finding"] == "near copy"]
    groups = {number: {row["image"] for row in rows if row["group"] == number} for number in "12345"}
    across = [groups["1"], groups["2"]]
    assert {"train/c/3.png", "test/c/same.png"} in across
    assert {"train/c/2.png", "test/c/resized.png"} in across
    assert groups["3"] == {"train/a/0.png", "train/b/exact.png"}
    assert {"train/b/1.png", "train/b/encoded.jpg"} in groups.values()
    assert {"train/a/4.png", "train/a/moved.png"} in groups.values()
    marks = {row["group"]: (row["across_parts"], row["labels_differ"]) for row in rows}
    assert [marks[number] for number in "123"] == [("yes", "no"), ("yes", "no"), ("no", "yes")]
    exact = {row["group"] for row in rows if float(row["correlation"]) == 1}
    assert "3" in exact
    page = (tmp_path / "l.html").read_text(encoding="utf-8")
    assert page.index("across parts, ") < page.index("labels differ, equal pixels")


def test_hostile_names_do_no_harm_in_table_and_page(tmp_path):
    root = folder_of(tmp_path / "d", {"train": {"=cmd()": 0, "<script>": 0, "<img src=x>": 1}})
    for name, color in (("=cmd()", 40), ("<script>", 200)):  # alike within a class, so that one wrong label is plain
        for number in range(20):
            pixels = np.random.default_rng(number + color).integers(color - 30, color + 30, (40, 40, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / "train" / name / f"plain{number}.png")
    (root / "train" / "=cmd()" / "plain0.png").rename(root / "train" / "<script>" / "@dark.png")
    shutil.copy(root / "train" / "=cmd()" / "plain1.png", root / "train" / "=cmd()" / "\x1b[31m.png")
    arguments = (
        "labels",
        root,
        "--teacher",
        f"{tmp_path}/t.py:colour",
        "--out",
        tmp_path / "l.csv",
        "--threads",
        1,
        "--with-test",
    )
    (tmp_path / "t.py").write_text(
        "from torch import nn\nclass Mean(nn.Module):\n    def forward(self, x): return x.mean((2, 3)).repeat(1, 4)\n"
        "def colour(): return Mean(), {'mean': [0.5] * 3, 'std': [0.5] * 3}\n"
    )
    result = refilled(*arguments)
    assert "\x1b" not in result.output
    assert "fewer than 3 different images: <img src=x>" in result.stderr
    with (tmp_path / "l.csv").open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    doubts = [row for row in rows if row["finding"] == "doubtful label"]
    assert [(row["label"], row["suggested"]) for row in doubts] == [("<script>", "'=cmd()")]
    assert not any((cell or "").startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())
    page = (tmp_path / "l.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img src=x>" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert page.count("data:image/png;base64,") >= 3
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.slow
def test_a_run_is_examined_by_its_student_and_says_so(teacher):
    found = json.loads(refilled("labels", teacher, "--threads", 1, "--json").stdout)
    assert found["judged"] > 5 * 40  # and the validation images
    assert {doubt["place"]["label"] for doubt in found["doubts"]} <= set("01234")
    assert any("trained on these labels" in note for note in found["notes"])
    other = json.loads(refilled("labels", teacher, *LETTERS, "--json").stdout)
    assert other["network"] == "refilled/letters"
    assert not any("trained on these labels" in note for note in other["notes"])
    assert other["judged"] == found["judged"]


def test_copies_share_a_fold_and_classes_are_spread():
    chance = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (300,), generator=chance)
    groups = torch.randint(150, (300,), generator=chance).numpy()
    folds = deal_folds(labels, groups).numpy()
    assert all(len(set(folds[groups == number])) == 1 for number in groups)
    assert set(folds) == set(range(5))
    alone = deal_folds(labels, np.arange(300)).numpy()
    for number in range(7):
        counts = np.bincount(alone[labels.numpy() == number], minlength=5)
        assert counts.max() - counts.min() <= 1


def test_a_class_that_the_other_folds_lack_has_probability_zero():
    points = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 2
    labels[:3] = 2
    groups = np.arange(40)
    groups[:3] = 0  # three copies, so one fold holds the whole class
    found = held_out_probabilities(points, labels, groups)
    assert found.shape == (40, 3)
    assert np.allclose(found.sum(1), 1)
    assert (found[:3, 2] == 0).all()
    folds = deal_folds(labels, groups).numpy()
    assert (found[folds != folds[0], 2] > 0).all()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("labels", "{copied}"), "there is no network to embed the images; give one, for example --teacher"),
        (("labels", "{copied}", *LETTERS, "--out", "l.txt"), "must end in .csv"),
        (("labels", "{copied}", *LETTERS, "--out", "there.csv"), "there.html exists; choose another --out"),
        (("labels", "{teacher}", *LETTERS, "--image-size", 8, "--seed", 1), "which determines --image-size, --seed"),
        (("labels", "nowhere", *LETTERS), "nowhere"),
        (("labels", "{copied}", "--teacher", "refilled/leters"), "refilled/leters"),
    ],
    ids=lambda part: str(part)[-40:],
)
def test_mistakes_are_explained_and_leave_no_file(copied, teacher, tmp_path, monkeypatch, arguments, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.html").write_text("mine")
    with pytest.raises(RefilledError, match=hint):
        refilled(*(str(argument).format(copied=copied, teacher=teacher) for argument in arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["there.html"]
    assert (tmp_path / "there.html").read_text() == "mine"


def test_a_run_that_names_a_file_of_code_does_not_execute_it(teacher, tmp_path):
    run = shutil.copytree(teacher, tmp_path / "run")
    (tmp_path / "t.py").write_text("raise SystemExit('executed')")
    text = (run / "run.toml").read_text()
    (run / "run.toml").write_text(f'teacher = "{tmp_path}/t.py:make"\n{text}')
    with pytest.raises(RefilledError, match="names a Python file, which would be executed"):
        refilled("labels", run)


def test_without_cleanlab_the_install_line_comes_before_any_work(copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(RefilledError, match=r"pip install 'refilled\[clean\]'"):
        refilled("labels", copied, *LETTERS)
