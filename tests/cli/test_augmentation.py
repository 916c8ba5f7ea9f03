"""Options of augmentation on the command line and in files."""

import json

import pytest
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.compare.comparison import Comparison
from refilled.config import Run
from refilled.errors import RunError
from refilled.runs.prepared import Prepared, resolve
from refilled.training.loop import views_of

FLAGS = ["--auto-augment", "trivial", "--color-jitter", "0.4", "--random-erasing", "0.25"]
COMMON = ["digits:5-9", "--teacher", "refilled/letters", "--shots", "6", "--threads", "1", "--precision", "32-true"]


def refilled(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_a_run_records_the_options_and_its_cache_is_the_live_teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    built = refilled("cache", "build", *COMMON, "--views", 2, *FLAGS)
    assert built.count("embedding its images") == 2
    run = [*COMMON, "--student", "wrn_10_1", "--method", "rkd", "--epochs", 2, "--no-report", "--views", 2]
    found = {}
    for name, flags in {"altered": FLAGS, "plain": []}.items():
        said = refilled("distill", *run, *flags, "--out", tmp_path / name)
        assert ("embedding its images" in said) == (name == "plain")  # which needs a cache of its own
        found[name] = json.loads((tmp_path / name / "result.json").read_text())["teacher"]["cache"]
        assert found[name]["largest_difference"] < 1e-4
    assert found["altered"]["live_accuracy"] == found["altered"]["cached_accuracy"] != found["plain"]["live_accuracy"]
    recorded = Run.from_toml((tmp_path / "altered" / "run.toml").read_text())
    assert (recorded.auto_augment, recorded.color_jitter, recorded.random_erasing) == ("trivial", 0.4, 0.25)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("altered", "plain")]
    assert weights[0] != weights[1]


ROW = 'title = "t"\nrun = {{ task = "digits", student = "wrn_10_1" }}\n[rows]\na = {{ method = "vanilla", {} }}\n'


def test_a_comparison_takes_the_options(tmp_path):
    comparison = Comparison.from_toml(ROW.format('auto_augment = "rand", random_erasing = 0.1'))
    run = comparison.grid(tmp_path)["a"][0]
    views = views_of(run, Prepared(resolve(run)).task)
    assert (views.auto_augment, views.color_jitter, views.random_erasing) == ("rand", 0.0, 0.1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ('auto_augment = "trival"', "unknown auto_augment 'trival'; did you mean 'trivial'"),
        ('augmentation = "flip"', "unknown augmentation 'flip'"),
        ("random_erasing = 25", "random_erasing = 25 is out of range; give a number from 0 to 1"),
    ],
)
def test_a_mistake_in_a_comparison_is_found_before_training(fault, said):
    with pytest.raises(RunError, match=said):
        Comparison.from_toml(ROW.format(fault))
