"""Runs that learn from images without labels too: exact, honest about it, and the same everywhere."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from drawn import picture, put
from refilled.cli.app import app
from refilled.config import Run
from refilled.cost.run import forecast
from refilled.cost.step import Cost, Line
from refilled.errors import RunError
from refilled.recipe import Recipe
from refilled.runs.experiment import distill, resume
from refilled.runs.result import Result
from refilled.training.journal import Interrupted
from refilled.training.progress import Display

QUICK = Run(
    task="digits:5-9",
    student="wrn_10_1",
    epochs=2,
    batch_size=100,
    shots=4,
    unlabelled="rest",
    threads=1,
    precision="32-true",
    val=0.5,
    method="refilled",
    settings={"embedding_share": 0.0, "centers": "global", "centered": True, "regression_weight": 10.0, "trust": 1.0},
)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "caches"))


def content(folder: Path) -> bytes:
    return b"".join((folder / name).read_bytes() for name in ("model.safetensors", "log.jsonl"))


class Stopping(Display):
    """Interrupt a run after this many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, epoch, images, values):
        self.left -= 1
        if self.left == 0:
            raise Interrupted(2)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"views": 2, "mixup": 0.5}], ids=["live", "cached and mixed"])
def test_an_interrupted_run_gives_the_same_result_as_an_uninterrupted_one(teacher, tmp_path, changes):
    run = replace(QUICK, teacher=teacher, **changes)
    result = distill(run, tmp_path / "whole")
    with pytest.raises(Interrupted):
        distill(run, tmp_path / "parts", display=Stopping(3), seconds_between_saves=0)
    resume(tmp_path / "parts")
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert result.data["images"]["train"] == 20
    assert result.data["unlabelled"]["images"] > 200
    assert result.data["unlabelled"]["source"] == "rest"


@pytest.mark.slow
def test_all_unlabelled_images_are_seen_once_an_epoch(teacher, tmp_path):
    seen = []

    class Counting(Display):
        def step(self, epoch, images, values):
            seen.append(images)

    result = distill(replace(QUICK, teacher=teacher, epochs=1), tmp_path / "a", display=Counting())
    steps = QUICK.steps_over(20, result.data["unlabelled"]["images"])
    assert len(seen) == steps
    assert sum(seen) == result.data["unlabelled"]["images"] + 20 * steps


@pytest.mark.slow
def test_after_their_span_unlabelled_images_are_no_longer_seen(teacher, tmp_path):
    counted = []

    class Counting(Display):
        def step(self, epoch, images, values):
            counted.append(images)

    distill(replace(QUICK, teacher=teacher, unlabelled_span=0.5), tmp_path / "a", display=Counting())
    half = len(counted) // 2
    assert min(counted[:half]) > 20
    assert set(counted[half:]) == {20}


@pytest.mark.slow
def test_a_method_without_use_for_them_sees_none_and_says_so(tmp_path):
    plain = replace(QUICK, method="vanilla", settings={})
    result = distill(plain, tmp_path / "a")
    assert any("no use for unlabelled images" in note for note in result.data["notes"])
    foreign = replace(plain, unlabelled="digits:0-4")
    weights = []
    for number, run in enumerate((plain, foreign)):
        distill(replace(run, batch_size=1000), tmp_path / f"{number}")  # one step an epoch, however many there are
        weights.append((tmp_path / f"{number}" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_stages_distil_without_labels_and_tune_with_them(teacher, tmp_path):
    run = replace(QUICK, teacher=teacher, method="distil_then_tune", settings={"distil_share": 0.5})
    distill(run, tmp_path / "a")
    entries = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in entries] == ["distil", "tune"]
    assert entries[1]["lr"] < 0.2 * entries[0]["lr"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["self_training", "feature_mse"])
def test_methods_beside_it_learn_from_them(teacher, tmp_path, method):
    settings = {"threshold": 0.3, "start": 0} if method == "self_training" else {}
    run = replace(QUICK, teacher=teacher, method=method, settings=settings)
    distill(run, tmp_path / "a")
    distill(replace(run, unlabelled="digits:0-4"), tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "b")
    assert not any("no use" in note for note in Result.load(tmp_path / "a").data["notes"])


@pytest.mark.slow
def test_the_forecast_counts_them(teacher, monkeypatch):
    # A measured speed would differ between the two forecasts on a busy machine.
    monkeypatch.setattr("refilled.cost.run.scoring_cost", lambda *of, **more: Cost(Line(0.0, 0.001), None))
    run = replace(QUICK, teacher=teacher, views=2)
    found = forecast(run)
    assert found.size.unlabelled > 200
    assert found.stages[-1].steps == run.steps_over(20, found.size.unlabelled)
    assert "without labels" in dict(found.rows())["task"]
    alone = forecast(replace(run, unlabelled=None))
    assert found.seconds["embedding by the teacher"] > 5 * alone.seconds["embedding by the teacher"]


@pytest.mark.parametrize(
    ("images", "unlabelled", "batch", "steps"),
    [(20, 1400, (20, 44), 32), (1000, 1000, (32, 32), 32), (1000, 10, (32, 10), 32), (20, 0, (20, 0), 1)],
)
def test_shares_of_a_batch(images, unlabelled, batch, steps):
    assert Recipe().batch_over(images, unlabelled) == batch
    assert Recipe().steps_over(images, unlabelled) == steps


def test_a_batch_of_one_has_no_room_for_two_kinds():
    with pytest.raises(RunError, match="batch-size"):
        Recipe(batch_size=1).batch_over(5, 5)


@pytest.mark.slow
def test_the_command_takes_a_folder_and_its_record_names_it(teacher, tmp_path):
    for number in range(6):
        put(tmp_path / "heap" / f"{number}.png", picture(number, 8).convert("L"))
    arguments = "digits:5-9 --shots 2 --epochs 1 --batch-size 10 --student wrn_10_1 --preset good --threads 1 --json"
    named = ["--teacher", teacher, "--unlabelled", str(tmp_path / "heap"), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["distill", *arguments.split(), *named])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["data"]["unlabelled"]["images"] == 6
    assert Run.from_toml((tmp_path / "run" / "run.toml").read_text()).unlabelled == str(tmp_path / "heap")
    assert torch.isfinite(torch.tensor(record["accuracy"]))
