"""The commands in a report repeat its run, and compare it with the student alone."""

import shlex
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from refilled.cli import compare as comparing
from refilled.cli import train as module
from refilled.cli.app import app
from refilled.config import WHERE, Run
from refilled.presets import PRESETS, WARM_START, with_preset
from refilled.report.command import command_of, comparison_of, how_to_know
from refilled.runs.prepared import resolve

OURS = {"task": "digits", "student": "wrn_10_1"}
TAUGHT = {**OURS, "teacher": "refilled/letters", "method": "refilled"}
WARM = {**TAUGHT, "student": "wrn_10_1:weights.pth"}


@pytest.mark.parametrize(
    "run",
    [
        Run(task="digits:5-9", student="wrn_10_1", epochs=3, seed=2, balance="logits"),
        Run(task="a folder", student="wrn_10_1", teacher="refilled/letters", method="refilled", guard=True, shots=2),
        Run(task="digits", student="wrn_10_1", teacher="x.py:load", method="rkd", settings={"angle_weight": "7.0"}),
        Run(task="digits", student="timm/resnet18", pretrained=True),
        Run(task="digits", student="wrn_10_1:weights.pth", teacher="refilled/letters", method="refilled", batch_size=8),
    ],
    ids=["train", "distill", "settings", "published weights", "weights from a file"],
)
def test_it_is_the_run_that_it_was_written_for(run, monkeypatch):
    begun = []
    monkeypatch.setattr(module, "_distill", lambda run, *_: begun.append(run))
    program, *arguments = shlex.split(command_of(run))
    assert program == "refilled"
    assert CliRunner().invoke(app, arguments).exit_code == 0
    (again,) = begun
    places = {name: getattr(run, name) for name in WHERE}
    assert replace(again, **places) == run


def compared(run: Run, monkeypatch):
    """Return the comparison that the command asks for, as the program reads it."""
    asked = []
    monkeypatch.setattr(comparing, "_compare", lambda comparison, *_: asked.append(comparison))
    _, *arguments = shlex.split(comparison_of(run))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return asked[0]


@pytest.mark.parametrize(
    "run",
    [
        Run(**TAUGHT),
        Run(**TAUGHT, guard=True),
        Run(**with_preset("good", TAUGHT)),
        Run(**{**with_preset("good", TAUGHT), "guard": False}),
        Run(**with_preset("good", {**TAUGHT, "unlabelled": "rest", "shots": 2, "unlabelled_span": 0.5})),
        Run(**with_preset("patient", {**TAUGHT, "settings": {"kd_weight": 0.25, "right_only": True}})),
        Run(**with_preset("paper", TAUGHT)),
        Run(**with_preset("good", {**WARM, **WARM_START}, from_weights=True)),
        Run(**with_preset("good", WARM)),
        Run(**{**TAUGHT, "method": "rkd", "settings": {"angle_weight": 7.0}, "epochs": 3, "views": 4, "seed": 9}),
        Run(**{**TAUGHT, "method": "fine_tune", "student": None, "epochs": 3, "lr": 1e-4}),
        Run(**{**TAUGHT, "method": "self_training", "teacher": None, "unlabelled": "rest", "shots": 3}),
        Run(**{**TAUGHT, "teacher": ("a b/run", "it's.py:load"), "teacher_mean": (0.1, 0.2, 0.3), "teacher_size": 64}),
        Run(**{**TAUGHT, "task": "my photos/of birds", "data_root": "/data sets/"}),
        Run(**OURS, epochs=3, least_steps=50, nesterov=False, optimizer="adamw", lr=0.001, allow_bad=True),
        Run(**OURS, teacher="refilled/letters", val=0.2, score="val", image_size=16, cutmix=1.0),
    ],
    ids=lambda run: f"{run.method}-{run.epochs}-{len(run.settings)}",
)
def test_the_comparison_has_the_run_and_one_like_it_without_its_teacher(run, monkeypatch):
    grid = compared(run, monkeypatch).grid("out")
    wanted = replace(resolve(run), seed=0)
    row = next(iter(grid)) if run.method == "vanilla" else list(grid)[-1]
    without = {n: None for n in ("teacher", "teacher_mean", "teacher_std", "teacher_size", "teacher_embedding")}
    if run.method in ("vanilla", "self_training"):
        wanted = replace(wanted, **without)  # which the method ignores
    places = {name: getattr(wanted, name) for name in WHERE if name != "data_root"}
    assert replace(resolve(grid[row][0]), **places) == wanted
    alone = next(iter(grid.values()))[0]
    names = ("method", "settings", "guard", "seed", "student", *without)
    assert resolve(replace(alone, **{name: getattr(run, name) for name in names})) == resolve(run)
    assert alone.method == "vanilla"
    assert len(next(iter(grid.values()))) == 3


def test_a_preset_is_named_and_only_what_differs_from_it_is_set():
    good = Run(**with_preset("good", TAUGHT))
    assert "--methods vanilla,refilled:good --seeds" in comparison_of(resolve(good))
    other = replace(good, settings={**good.settings, "worth": 3.0}, guard=False)
    assert "--methods vanilla,refilled:good --set worth=3.0 --no-guard --seeds" in comparison_of(resolve(other))
    assert "--set" not in comparison_of(resolve(Run(**TAUGHT)))
    warm = Run(**with_preset("good", WARM, from_weights=True))
    assert "--methods vanilla,refilled:good --seeds" in comparison_of(resolve(warm))
    assert {"good", "patient"} <= set(PRESETS)  # two of one method, of which the nearer one is named


def test_a_method_file_is_not_executed(tmp_path, monkeypatch):
    file = tmp_path / "my method.py"
    file.write_text("raise SystemExit('executed')")
    run = Run(**{**TAUGHT, "method": str(file), "settings": {"weight": 2.0}})
    assert f"--methods 'vanilla,{file}' --set weight=2.0" in comparison_of(run)
    file.write_text("from refilled.methods.regression import regression\n")
    file = file.rename(tmp_path / "regression.py")
    run = replace(run, method=str(file), settings={"weight": 2.0})
    again = list(compared(run, monkeypatch).grid("out").values())[-1][1]
    assert resolve(again).settings == resolve(run).settings
    assert again.method == run.method


def test_the_question_is_about_what_the_run_has():
    assert how_to_know(Run(**TAUGHT)).startswith("Did the teacher help? One run cannot show it.")
    assert how_to_know(Run(**OURS)).startswith("Would a teacher help?")
    assert "--teacher TEACHER" in how_to_know(Run(**OURS))
    alone = Run(**{**TAUGHT, "method": "self_training", "teacher": None})
    assert how_to_know(alone).startswith("Did self_training help?")
    assert "TEACHER" not in how_to_know(alone)
