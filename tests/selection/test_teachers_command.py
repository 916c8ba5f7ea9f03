"""The command ``teachers`` and ``--teacher-size auto``, as people use them."""

import csv
import io
import json
import tomllib
from textwrap import dedent

import pytest
from typer.testing import CliRunner

from drawn import folder
from refilled.cli.app import app
from refilled.data import load_task
from refilled.errors import RefilledError
from refilled.selection.sample import sample_of

CODE = """
    import torch
    from torch import nn

    ABOUT = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}

    class Mean(nn.Module):
        '''The mean colour, which is all that tells the classes apart; scaled by the size of the image if asked.'''
        def __init__(self, noise): super().__init__(); self.noise = noise
        def forward(self, x):
            colour = x.mean((2, 3)).repeat(1, 4)
            chance = torch.randn(colour.shape, generator=torch.Generator().manual_seed(len(x)))
            return colour + self.noise(x.shape[-1]) * chance

    class NearlyConstant(nn.Module):
        def forward(self, x):
            seeds = (1000 * x.double().abs().sum((1, 2, 3))).long().tolist()
            chance = [torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            return 1 + 1e-3 * torch.stack(chance)

    def colour(): return Mean(lambda size: 0), ABOUT
    def sees_from_16(): return Mean(lambda size: 0.02 if size >= 16 else 2), ABOUT
    def nearly_constant(): return NearlyConstant(), ABOUT
    def constant(): return Mean(lambda size: float("nan")), ABOUT
    def random_weights():
        from refilled.models import create_model
        torch.manual_seed(99)
        return create_model("wrn_10_2", 5, image_size=8)
    """


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder of three classes that differ in colour, and a file of teachers."""
    root = tmp_path_factory.mktemp("selection")
    (root / "t.py").write_text(dedent(CODE))
    folder(root / "d", dict.fromkeys("abc", 20), tinted=True)
    return root


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "caches"))


def refilled(*arguments, code=0):
    """Run a command in this process; return its standard output."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def teachers(*arguments):
    return json.loads(refilled("teachers", *arguments, "--threads", 1, "--json"))


@pytest.mark.slow
def test_letters_rank_above_random_weights_above_a_constant(here):
    names = ["refilled/letters", f"{here}/t.py:random_weights", f"{here}/t.py:nearly_constant"]
    given = [word for name in reversed(names) for word in ("--candidates", name)]
    found = teachers("digits", "--shots", 10, "--image-size", 8, *given)
    assert [one["candidate"] for one in found["candidates"]] == names
    letters, random, constant = found["candidates"]
    assert letters["nearest_class_mean"]["low"] > random["nearest_class_mean"]["percent"]
    assert random["nearest_class_mean"]["low"] > constant["nearest_class_mean"]["high"]
    assert letters["linear_probe"]["percent"] > constant["linear_probe"]["percent"] + 40
    assert letters["logme"] > constant["logme"]
    assert "chance" in constant["fault"]
    assert constant["gain"] == 0
    assert letters["cost"]["multiplications"] > 1e6
    assert found["images"] == found["labels_per_class"] * 10


def test_multiplications_are_those_of_the_layers(here):
    (found,) = teachers("digits", "--shots", 4, "--image-size", 8, "--candidates", "refilled/letters")["candidates"]
    from refilled.models import load_teacher

    teacher, counted = load_teacher("refilled/letters", image_size=8), []

    def count(layer, inputs, output):
        if layer.weight.ndim == 4:
            counted.append(output[0].numel() * layer.weight[0].numel())
        else:
            counted.append(layer.weight.numel())

    import torch
    from torch import nn

    for layer in teacher.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    teacher(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert found["cost"]["multiplications"] == sum(counted)


def test_a_useless_teacher_is_reported_as_useless(here):
    said = refilled("teachers", here / "d", "--candidates", f"{here}/t.py:nearly_constant", "--threads", 1)
    assert "no teacher has a forecast gain of 1 point or more" in said


def test_an_unusable_teacher_is_named_and_the_others_are_measured(here):
    given = ("--candidates", f"{here}/t.py:constant", "--candidates", f"{here}/t.py:colour")
    first, last = teachers(here / "d", *given)["candidates"]
    assert (first["candidate"], last["candidate"]) == (f"{here}/t.py:colour", f"{here}/t.py:constant")
    assert last["unusable"]
    assert "not finite" in last["fault"]
    assert last["linear_probe"] is None


@pytest.mark.slow
def test_embeddings_are_computed_once(here, monkeypatch):
    given = (here / "d", "--candidates", "refilled/letters")
    (first,) = teachers(*given)["candidates"]
    from refilled.training.teacher_cache import TeacherCache

    monkeypatch.setattr(TeacherCache, "_write_shard", lambda *_: pytest.fail("embedded again"))
    (again,) = teachers(*given)["candidates"]
    assert again["logme"] == first["logme"]
    assert "a sample of" in refilled("cache", "info")


def test_a_changed_python_file_is_measured_again(here, tmp_path):
    file = tmp_path / "mine.py"
    given = (here / "d", "--candidates", f"{file}:make")
    file.write_text((here / "t.py").read_text() + "\nmake = colour\n")
    (good,) = teachers(*given)["candidates"]
    file.write_text((here / "t.py").read_text() + "\nmake = nearly_constant\n")
    (bad,) = teachers(*given)["candidates"]
    assert good["linear_probe"]["percent"] > bad["linear_probe"]["percent"] + 30


def test_the_smallest_size_that_is_as_good_is_recommended(here):
    found = teachers(here / "d", "--candidates", f"{here}/t.py:sees_from_16", "--sizes", "8,12", "--sizes", "16 24")
    assert sorted(one["size"] for one in found["candidates"]) == [8, 12, 16, 24]
    assert found["sizes"] == {f"{here}/t.py:sees_from_16": 16}


def test_a_csv_has_one_row_per_candidate_and_size(here):
    said = refilled(
        "teachers", here / "d", "--candidates", f"{here}/t.py:colour", "--sizes", "8,16", "--threads", 1, "--csv"
    )
    rows = list(csv.DictReader(io.StringIO(said)))
    assert sorted(int(row["size"]) for row in rows) == [8, 16]
    assert {row["candidate"] for row in rows} == {f"{here}/t.py:colour"}
    for row in rows:
        assert float(row["linear_probe_low"]) <= float(row["linear_probe"]) <= float(row["linear_probe_high"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--candidates", "nothing"), "candidate nothing: 'nothing' is not a teacher"),
        (("--candidates", "timm/resnet5o"), "did you mean timm/resnet50"),
        (("--candidates", "refilled/letters", "--sizes", "big"), "'big' is not a size in pixels"),
        (("--candidates", "refilled/letters", "--json", "--csv"), "--json and --csv cannot be combined"),
        (("--candidates", "refilled/letters") * 2, "given twice"),
        (("--candidates", "refilled/letters", "--shots", 1), "two classes need two images"),
        ((), "cannot be reached .* and these weights are not on this machine"),
    ],
    ids=lambda part: str(part)[:30],
)
def test_mistakes_are_explained(here, arguments, reason):
    with pytest.raises(RefilledError, match=reason):
        refilled("teachers", here / "d", "--threads", 1, *arguments)


def test_downloads_are_named_with_their_size_and_refused_offline(here, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RefilledError, match=r"not on this machine: timm/resnet50.a1_in1k \(102 MB\)"):
        refilled("teachers", here / "d", "--candidates", "timm/resnet50.a1_in1k")


def test_a_sample_is_spread_over_the_classes():
    task = load_task("digits", shots=None, val=0.0)
    some = sample_of(task, 105).train
    counts = [(some.labels == number).sum().item() for number in range(10)]
    assert len(some) == 105
    assert set(counts) == {10, 11}
    assert sample_of(task, 105).fingerprint == sample_of(task, 105).fingerprint
    assert sample_of(task, 105, seed=1).fingerprint != sample_of(task, 105).fingerprint
    rows = [task.train.sources.index(name) for name in some.sources]
    assert task.train.pixels[rows].equal(some.pixels)
    assert task.train.labels[rows].equal(some.labels)


@pytest.mark.slow
def test_auto_settles_the_size_of_the_teacher_in_the_record(here, tmp_path):
    out = tmp_path / "run"
    given = ["distill", here / "d", "--teacher", f"{here}/t.py:sees_from_16", "--teacher-size", "auto", "--out", out]
    fixed = ["--student", "wrn_10_1", "--epochs", 1, "--threads", 1]
    result = CliRunner().invoke(app, [str(word) for word in (*given, *fixed)])
    assert result.exit_code == 0, result.output
    assert "teacher size 16 pixels, by the linear probe" in result.stderr
    assert tomllib.loads((out / "run.toml").read_text())["teacher_size"] == 16
    assert json.loads((out / "result.json").read_text())["teacher"]["image_size"] == 16


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--teacher-size", "large", "--teacher", "refilled/letters"), "a number of pixels, or auto; got 'large'"),
        (("--teacher-size", "auto", "--method", "vanilla"), "name one with --teacher"),
    ],
)
def test_mistakes_with_the_size_are_explained(here, tmp_path, arguments, reason):
    with pytest.raises(RefilledError, match=reason):
        refilled("distill", here / "d", *arguments, "--out", tmp_path / "run")
