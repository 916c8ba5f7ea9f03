"""Students that start from weights: which tensors they hold, and what is said of those that they do not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refilled.cli.options import configure
from refilled.config import Run
from refilled.errors import ModelError, RunError
from refilled.models import create_model, create_student, load_model, starts_from_weights
from refilled.presets import WARM_START
from refilled.runs.experiment import distill
from refilled.runs.prepared import Prepared, resolve

TIMM = "timm/mobilenetv3_small_050"
ABOUT = {"image_size": 32, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


def start(text):
    return create_student(str(text), ["a", "b", "c"], **ABOUT)


def body(model):
    return {name: value for name, value in model.state_dict().items() if not name.startswith("classifier.")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_a_run_continues_to_other_classes_with_its_normalisation(teacher):
    student, notes = start(teacher)
    before = load_model(Path(teacher))
    assert same(body(student), body(before))
    assert (notes, student.num_classes, student.class_names) == ([], 3, ("a", "b", "c"))
    assert torch.equal(student.mean, before.mean)
    assert torch.equal(student.std, before.std)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_weight_file_of_our_architecture_says_nothing_about_its_images(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", teacher)
    student, notes = start("wrn_10_1:$PLACE/model.safetensors")
    assert same(body(student), body(load_model(Path(teacher))))
    torch.testing.assert_close(student.mean.flatten(), torch.tensor(ABOUT["mean"]))
    assert len(notes) == 1
    assert "does not record how its images were normalised" in notes[0]


def test_a_timm_file_keeps_timms_normalisation_and_drops_its_classifier(tmp_path):
    import timm

    source = timm.create_model("mobilenetv3_small_050")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    student, notes = start(f"{TIMM}:{tmp_path / 'w.safetensors'}")
    assert notes == []
    assert torch.equal(student.state_dict()["body.conv_stem.weight"], source.conv_stem.weight)
    torch.testing.assert_close(student.mean.flatten(), torch.tensor(source.pretrained_cfg["mean"]))
    assert student.input_size is None  # images come as they are


def test_tensors_under_another_librarys_names_are_matched_by_their_order(tmp_path):
    import timm

    weights = timm.create_model("mobilenetv3_small_050").state_dict()
    torch.save({f"layer{number}": value for number, value in enumerate(weights.values())}, tmp_path / "w.pth")
    student, notes = start(f"{TIMM}:{tmp_path / 'w.pth'}")
    assert same(body(student), {f"body.{n}": v for n, v in weights.items() if not n.startswith("classifier.")})
    assert "matched by order and shape" in notes[0]


def test_what_is_missing_or_left_over_is_named(teacher, tmp_path):
    weights = load_file(f"{teacher}/model.safetensors")
    gone = next(name for name in weights if name.endswith("conv1.weight"))
    del weights[gone]
    save_file({**weights, "queue.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    _, notes = start(f"wrn_10_1:{tmp_path / 'w.safetensors'}")
    assert f"initialised at random: 1 tensor, {gone}" in notes[0]
    assert "not used from" in notes[1]
    assert "queue.weight" in notes[1]


@pytest.mark.parametrize("text", ["wrn_16_1", "timm/resnet18", "runs/none"])
def test_names_of_architectures_are_not_weights(text):
    assert not starts_from_weights(text)


def test_what_cannot_be_started_from_is_refused_with_the_remedy(teacher, tmp_path):
    save_file(create_model("convnet4", 5, image_size=32).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"other.safetensors does not fit wrn_10_1: it contains 0 of its"):
        start(f"wrn_10_1:{tmp_path / 'other.safetensors'}")
    with pytest.raises(ModelError, match="there is no weight file"):
        start(f"wrn_10_1:{tmp_path / 'none.pth'}")
    with pytest.raises(ModelError, match=r"there is no file mine\.py"):
        start("mine.py:make")
    run = Run(task="digits:5-9", student=teacher, pretrained=True, threads=1)
    with pytest.raises(RunError, match="leave one out"):
        Prepared(resolve(run))


def test_a_run_from_weights_begins_where_they_ended_and_can_be_loaded(teacher, tmp_path):
    run = Run(task="digits:5-9", student=teacher, epochs=1, batch_size=20, shots=8, threads=1, precision="32-true")
    assert same(body(Prepared(resolve(run)).student), body(load_model(Path(teacher))))
    distill(replace(run, lr=1e-9), tmp_path / "run")
    assert load_model(tmp_path / "run").architecture == "wrn_10_1"
    parameters = dict(load_model(Path(teacher)).named_parameters())
    for name, value in load_model(tmp_path / "run").named_parameters():
        if not name.startswith("classifier."):
            torch.testing.assert_close(value, parameters[name], rtol=0, atol=1e-5)


WARM = {"task": "digits", "student": "wrn_10_1:weights.pth", "teacher": "refilled/letters"}


@pytest.mark.parametrize("student", [{"student": "wrn_10_1:weights.pth"}, {"student": TIMM, "pretrained": True}])
def test_the_command_line_trains_a_warm_student_by_its_own_recipe(student):
    fresh = configure(None, {"task": "digits", "student": TIMM})
    warm = configure(None, {"task": "digits", **student})
    changed = {name for name, value in vars(warm).items() if value != vars(fresh)[name]}
    assert changed == {*WARM_START, *student} - {"student" if student["student"] == TIMM else ""}
    assert {name: getattr(warm, name) for name in WARM_START} == WARM_START


@pytest.mark.parametrize(
    ("given", "recipe"),
    [
        ({"weight_decay": 0.01}, ("adamw", WARM_START["lr"], 0.01)),
        ({"lr": 0.02}, ("sgd", 0.02, 5e-4)),
        ({"optimizer": "adamw", "lr": 0.001}, ("adamw", 0.001, 5e-4)),
    ],
)
def test_a_given_rate_or_optimiser_leaves_the_rest_as_it_is(given, recipe):
    run = configure(None, {**WARM, **given})
    assert (run.optimizer, run.lr, run.weight_decay) == recipe


def test_a_presets_rate_is_kept_and_its_settings_suit_a_warm_student():
    paper = configure("paper", WARM)
    assert (paper.optimizer, paper.lr) == ("sgd", 0.1)
    fresh = configure("good", {**WARM, "student": "wrn_10_1"})
    warm = configure("good", {**WARM, "settings": {"kd_weight": 3.0}})
    assert warm.settings["regression_weight"] > fresh.settings["regression_weight"]
    assert warm.settings["kd_weight"] == 3.0
    assert warm.guard
