"""Teachers that are no good: found before training, or blamed by name during it; on commands as people type them."""

import json
from textwrap import dedent

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.errors import ModelError
from refilled.models import Backbone, load_teacher, probe

CODE = """
    import numpy, timm, torch
    from torch import nn

    ABOUT = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}

    class Pixels(nn.Module):
        '''The first numbers of an image, changed by a function of them.'''
        def __init__(self, change): super().__init__(); self.change = change
        def forward(self, x): return self.change(x.flatten(1)[:, ::64])

    def brightest(y): return y[:, :1] >= y[:, :1].max()

    def plain(): return Pixels(lambda y: y), ABOUT
    def nan(): return Pixels(lambda y: y * float("nan")), ABOUT
    def infinite(): return Pixels(lambda y: y / 0), ABOUT
    def constant(): return Pixels(lambda y: 0 * y + 3), ABOUT
    def zero(): return Pixels(lambda y: 0 * y), ABOUT
    def one_image(): return Pixels(lambda y: y.masked_fill(brightest(y), float("nan")) if len(y) > 8 else y), ABOUT
    def fewer_rows(): return Pixels(lambda y: y[:2]), ABOUT
    def integers(): return Pixels(lambda y: (100 * y).long()), ABOUT
    def dropout(): return Pixels(lambda y: nn.functional.dropout(y, 0.5)), ABOUT
    def batch_statistics(): return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072, track_running_stats=False)), ABOUT
    def other_size(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 8)), {**ABOUT, "input_size": 32}
    def gray(): return timm.create_model("test_resnet", in_chans=1), {"input_size": 32}
    def own_gray(): return nn.Conv2d(1, 8, 3), ABOUT
    def own_gray_with_one_mean(): return nn.Conv2d(1, 8, 3), {"mean": [0.5], "std": [0.5]}
    def four_channels(): return nn.Conv2d(4, 8, 3), ABOUT
    def names():
        net = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.Linear(8, 2))
        net.embed = lambda x: net[1](net[0](x))
        net.class_names = numpy.array(["x", "y"])
        return net, ABOUT
    """


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    root = tmp_path_factory.mktemp("sick")
    (root / "t.py").write_text(dedent(CODE))
    for number, name in enumerate("abc"):
        (root / "d" / name).mkdir(parents=True)
        for index in range(10):
            pixels = np.random.default_rng(99 * number + index).integers(0, 60, (32, 32, 3))
            pixels[..., number] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(root / "d" / name / f"{index}.png")
    return root


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "caches"))


def refilled(*arguments):
    """Run a command; returns its exit code and all that it says."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, ModelError):
        return 2, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def distill(here, tmp_path, teacher, *more):
    fixed = ("--student", "wrn_10_1", "--epochs", 1, "--threads", 1, "--quiet", "--out", tmp_path / "run")
    return refilled("distill", here / "d", "--teacher", f"{here}/t.py:{teacher}", *fixed, *more)


@pytest.mark.parametrize("more", [(), ("--preset", "good"), ("--method", "linear_probe"), ("--views", 2)], ids=str)
@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ("nan", r"embedding is not finite .* for 8 of 8 images: a[/\\]"),
        ("infinite", "embedding is not finite"),
        ("constant", "embedding is the same for all of 8 different images"),
        ("zero", "embedding is the same for all"),
    ],
)
def test_a_teacher_without_use_is_refused_before_training(here, tmp_path, teacher, reason, more):
    code, said = distill(here, tmp_path, teacher, *more)
    assert code == 2
    with pytest.raises(ModelError, match=reason):
        raise ModelError(said)
    assert "--lr" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [(), ("--preset", "good"), ("--method", "linear_probe"), ("--views", 2)], ids=str)
def test_nan_for_one_image_names_that_image_and_never_the_learning_rate(here, tmp_path, more):
    code, said = distill(here, tmp_path, "one_image", *more)
    assert code == 2
    assert "teacher's embedding is not finite (NaN or infinite) for 1 of" in said
    assert ".png. The fault lies in the teacher" in said
    assert "--lr" not in said


def test_nan_for_one_image_is_found_while_a_cache_is_built(here):
    code, said = refilled("cache", "build", here / "d", "--teacher", f"{here}/t.py:one_image", "--views", 1)
    assert code == 2
    assert "for 1 of" in said


def test_nan_for_one_image_is_found_in_few_shot_tests(here, tmp_path):
    split = {"seen": ["a"], "unseen": ["b", "c"]}
    (here / "d" / "split.json").write_text(json.dumps(split))
    data = f"{here}/d@split=split.json"
    fixed = ("--n-way", 2, "--n-query", 8, "--n-episodes", 4, "--method", "nearest_neighbour", "--quiet")
    code, said = refilled(
        "fewshot", "--data", data, "--teacher", f"{here}/t.py:one_image", "--out", tmp_path / "o", *fixed
    )
    assert code == 2
    assert ".png. The fault lies in the teacher" in said
    code, said = refilled(
        "fewshot", "--data", data, "--teacher", f"{here}/t.py:constant", "--out", tmp_path / "p", *fixed
    )
    assert code == 2
    assert "the same for all" in said


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ("fewer_rows", "one row of 48 numbers per image as its embedding; for 8 images"),
        ("integers", "floating-point"),
        ("other_size", "RuntimeError: mat1 and mat2"),
        ("four_channels", "RuntimeError.*channels"),
    ],
)
def test_what_cannot_be_used_is_explained_without_a_traceback(here, tmp_path, teacher, reason):
    code, said = distill(here, tmp_path, teacher)
    assert code == 2
    with pytest.raises(ModelError, match=reason):
        raise ModelError(said)


@pytest.mark.parametrize("teacher", ["gray", "own_gray", "own_gray_with_one_mean", "names", "plain"])
def test_grayscale_teachers_and_names_in_an_array_are_accepted(here, tmp_path, teacher):
    code, _ = distill(here, tmp_path, teacher)
    assert code == 0
    assert not [note for note in notes(tmp_path) if "teacher" in note]


@pytest.mark.parametrize("teacher", ["dropout", "batch_statistics"])
def test_train_mode_left_on_is_said(here, tmp_path, teacher):
    code, _ = distill(here, tmp_path, teacher)
    assert code == 0
    (note,) = [note for note in notes(tmp_path) if "training mode" in note]
    assert "depending on chance or on the other images" in note


def notes(tmp_path):
    return json.loads((tmp_path / "run" / "result.json").read_text())["data"]["notes"]


def test_a_grayscale_teacher_sees_what_pillow_calls_gray(here):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    teacher = load_teacher(f"{here}/t.py:own_gray")
    gray = [np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in images]
    seen = (torch.from_numpy(np.stack(gray))[:, None] / 255 - 0.5) / 0.5
    torch.testing.assert_close(teacher.normalize(images), seen, atol=2 / 255, rtol=0)  # Pillow rounds to whole levels
    torch.testing.assert_close(teacher.normalize(images / 255), teacher.normalize(images))


class Model(Backbone):
    """Averages each channel."""

    def __init__(self):
        super().__init__(3, (), 0)

    def embed(self, images):
        return images.mean((2, 3)), ()


def test_equal_images_do_not_accuse_a_teacher():
    assert probe(Model(), torch.full((4, 3, 8, 8), 7, dtype=torch.uint8), list("abcd")) == ()


def test_a_single_image_can_be_asked_about():
    assert probe(Model(), torch.randint(0, 255, (1, 3, 8, 8), dtype=torch.uint8), ["a"]) == ()
