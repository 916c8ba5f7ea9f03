"""Teachers that are no good: found before training, or blamed by name during it; on commands as people type them."""

import json
from textwrap import dedent

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import drawn
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
    class Noise(nn.Module):
        '''Numbers that are drawn for each image, with the sum of its pixels as the seed.'''
        def forward(self, x):
            seeds = (1000 * x.double().abs().sum((1, 2, 3))).long().tolist()
            return torch.stack([torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def noise(): return Noise(), ABOUT
    def tokens():
        conv = nn.Conv2d(3, 6, 8, 8)
        net = nn.Module()
        net.embed = lambda x: {"last_hidden_state": torch.cat([conv(x).flatten(2)[..., :1], conv(x).flatten(2)], 2).mT}
        return net, ABOUT
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
    drawn.folder(root / "d", dict.fromkeys("abc", 10), size=32, tinted=True)
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


@pytest.mark.slow
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
def test_an_unusable_teacher_is_refused_before_training(here, tmp_path, teacher, reason, more):
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
    assert ".png. The cause is the teacher" in said
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
    assert ".png. The cause is the teacher" in said
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


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["gray", "own_gray", "own_gray_with_one_mean", "names", "plain"])
def test_grayscale_teachers_and_names_in_an_array_are_accepted(here, tmp_path, teacher):
    code, _ = distill(here, tmp_path, teacher)
    assert code == 0
    said = [
        note for note in notes(tmp_path) if "tells your classes apart" not in note
    ]  # what it knows is another matter
    assert not [note for note in said if "teacher" in note]


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["dropout", "batch_statistics"])
def test_train_mode_left_on_is_reported(here, tmp_path, teacher):
    code, _ = distill(here, tmp_path, teacher)
    assert code == 0
    (note,) = [note for note in notes(tmp_path) if "training mode" in note]
    assert "by chance or depending on the other images" in note


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--preset", "good"), ("--views", 2)], ids=str)
def test_a_teacher_that_knows_nothing_about_the_classes_is_reported(here, tmp_path, more):
    code, _ = distill(here, tmp_path, "noise", *more)
    assert code == 0
    assert any("tells your classes apart no better than chance" in note for note in notes(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("pooling", "width"), [("token", 6), ("mean", 6), ("both", 12)])
def test_the_embedding_is_chosen_on_the_command_line(here, tmp_path, pooling, width):
    code, _ = distill(here, tmp_path, "tokens", "--method", "linear_probe", "--teacher-embedding", pooling)
    assert code == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["teacher"]["embedding_dim"] == width
    assert f'teacher_embedding = "{pooling}"' in (tmp_path / "run" / "run.toml").read_text()


def test_what_a_teacher_does_not_have_is_refused_on_the_command_line(here, tmp_path):
    code, said = distill(here, tmp_path, "plain", "--teacher-embedding", "token")
    assert code == 2
    assert "use 'pooled'" in said


def notes(tmp_path):
    return json.loads((tmp_path / "run" / "result.json").read_text())["data"]["notes"]


def test_a_grayscale_teacher_sees_what_pillow_calls_gray(here):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    teacher = load_teacher(f"{here}/t.py:own_gray")
    gray = [np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in images]
    seen = (torch.from_numpy(np.stack(gray))[:, None] / 255 - 0.5) / 0.5
    torch.testing.assert_close(teacher.normalize(images), seen, atol=2 / 255, rtol=0)  # Pillow rounds to whole levels
    torch.testing.assert_close(teacher.normalize(images / 255), teacher.normalize(images))


HALF = (0.5, 0.5, 0.5)


class Model(Backbone):
    """Averages each channel."""

    def __init__(self):
        super().__init__(3, (), 0)

    def embed(self, images):
        return images.mean((2, 3)), ()


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Trained(Backbone):
    """A convolution and a batch normalisation that has seen images of random brightness, normalised in one way."""

    def __init__(self, mean, std):
        super().__init__(8, (), 0)
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8, momentum=None))
        self.set_preprocessing(mean, std)
        with torch.no_grad():
            self.train()(photographs(64))
        self.eval()

    def embed(self, images):
        return self.layers(images).mean((2, 3)), ()


def photographs(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(levels, (32, 32), mode="bilinear")
    return (255 * smooth).round().byte()


@pytest.mark.parametrize(
    "trained", [IMAGENET, (HALF, HALF), ((0.0,) * 3, (1.0,) * 3)], ids=["ImageNet", "half", "none"]
)
def test_a_wrong_normalisation_is_recognized_by_the_first_batch_normalisation(trained):
    names = {"ImageNet's": IMAGENET, "mean 0.5": (HALF, HALF), "none": ((0.0,) * 3, (1.0,) * 3)}
    teacher, images, sources = Trained(*trained), photographs(8, seed=2), list("abcdefgh")
    for given in (*names.values(), ((0.0,) * 3, (1 / 255,) * 3)):
        teacher.set_preprocessing(*given)
        found = probe(teacher, images, sources)
        assert teacher.mean.flatten().tolist() == pytest.approx(given[0])  # as it was
        assert teacher.std.flatten().tolist() == pytest.approx(given[1])
        if given == trained:
            assert found == ()
        else:
            (name,) = [name for name, values in names.items() if values == trained]
            assert f"but less with {name}" in found[0]


def test_an_untrained_batch_normalisation_says_nothing_about_the_normalisation():
    teacher = Trained(*IMAGENET)
    teacher.layers[1].reset_running_stats()
    teacher.set_preprocessing((0.0,) * 3, (1 / 255,) * 3)
    assert probe(teacher, photographs(8), list("abcdefgh")) == ()


def test_equal_images_do_not_accuse_a_teacher():
    assert probe(Model(), torch.full((4, 3, 8, 8), 7, dtype=torch.uint8), list("abcd")) == ()


def test_a_single_image_can_be_asked_about():
    assert probe(Model(), torch.randint(0, 255, (1, 3, 8, 8), dtype=torch.uint8), ["a"]) == ()
