"""Teachers that come with the package."""

import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from refilled.config import Run, what
from refilled.data import load_task
from refilled.errors import ModelError
from refilled.models import embedded_folder, load_teacher
from refilled.models.embedded import embedded_teachers
from refilled.runs.prepared import resolve
from refilled.training.evaluation import accuracy, predict_classes

SCRIPT = Path(__file__).parents[2] / "docs" / "build_teacher.py"


def script():
    specification = importlib.util.spec_from_file_location("build_teacher", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", embedded_teachers())
def test_an_embedded_teacher_is_small_frozen_and_of_full_precision(name):
    assert (embedded_folder(name) / "model.safetensors").stat().st_size < 1_000_000
    teacher = load_teacher(name)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {value.dtype for value in teacher.state_dict().values()} == {torch.float32, torch.int64}


def test_the_letters_that_it_was_trained_on_are_those_of_the_data_set():
    teacher, task = load_teacher("refilled/letters"), load_task("letters", val=0.0, image_size=8)
    assert teacher.class_names == task.classes
    recorded = json.loads((embedded_folder("refilled/letters") / "result.json").read_text())
    found = accuracy(predict_classes(teacher, task.test.pixels), task.test.labels)
    # Other versions of Pillow draw a little differently; the weights lost precision.
    assert found == pytest.approx(recorded["accuracy"], abs=3)


def test_its_record_is_that_of_the_script_that_makes_it():
    recorded = Run.from_toml((embedded_folder("refilled/letters") / "run.toml").read_text())
    again = replace(resolve(script().RUN), precision=recorded.precision)  # which depends on the processor
    assert what(asdict(again)) == what(asdict(recorded))


@pytest.mark.slow
def test_half_precision_changes_no_class_of_a_model(teacher, tmp_path):
    script().in_half(Path(teacher), tmp_path)
    task = load_task("digits:0-4")
    ours, theirs = (predict_classes(load_teacher(str(folder)), task.test.pixels) for folder in (tmp_path, teacher))
    assert (ours == theirs).float().mean() > 0.99


def test_an_unknown_one_is_refused_with_the_names_of_those_that_exist():
    with pytest.raises(ModelError, match="comes with refilled/letters only"):
        load_teacher("refilled/digits")
