"""Students from a user's Python file: trained, saved without code, and loaded where the user names the file."""

import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.config import Run
from refilled.errors import ModelError, RunError
from refilled.export.onnx_file import write_onnx
from refilled.models import create_student, load_model, save_model
from refilled.runs.experiment import distill, resume
from refilled.runs.inference import evaluate
from refilled.runs.result import Result
from refilled.training.journal import Interrupted
from stopping import Stopping

FILE = """
import torch
from torch import nn


class Body(nn.Module):
    def __init__(self, classes=7):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def features(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))


class Plain(Body):
    def forward(self, x):
        return self.head(self.features(x))


class Probable(Body):
    def forward(self, x):
        return self.head(self.features(x)).softmax(1)


class Embedding(Body):
    def forward_features(self, x):
        return self.features(x)

    def forward(self, x):
        return self.head(self.features(x))


def plain():
    torch.manual_seed(5)
    return Plain(), {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}


def unnormalised():
    return Plain()


def probable():
    return Probable()


def embedding():
    return Embedding()


def wide(width):
    return Plain(int(width))


def frozen():
    return Plain().requires_grad_(False)


def grey():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), {"mean": [0.5], "std": [0.5]}


def compiled():
    return torch.fx.symbolic_trace(Plain())


def of_timm():
    import timm

    return timm.create_model("mobilenetv3_small_050")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(FILE)
    return path


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    monkeypatch.setenv("REFILLED_CODE", "")


def start(text):
    return create_student(text, "abcde", image_size=8, mean=(0.1,) * 3, std=(0.3,) * 3)


def run_of(text: object) -> Run:
    return Run(task="digits:5-9", student=f"{text}", epochs=2, batch_size=20, shots=8, threads=1, precision="32-true")


@pytest.mark.parametrize("function", ["plain", "unnormalised", "probable", "embedding", "wide:3", "of_timm"])
def test_it_trains_and_the_loaded_student_is_the_same(file, tmp_path, function):
    student, _ = start(f"{file}:{function}")
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    before = {name: value.clone() for name, value in student.named_parameters()}
    student(images).logits.square().sum().backward()
    for parameter in student.parameters():
        if parameter.grad is not None:
            parameter.data -= 0.01 * parameter.grad
    changed = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert any("conv" in name for name in changed)
    assert {"classifier.weight", "classifier.bias"} <= changed
    save_model(student, tmp_path / "student")
    again = load_model(tmp_path / "student")
    assert torch.equal(again(images).logits, student.eval()(images).logits)
    assert again.class_names == tuple("abcde")
    assert ".py" in (tmp_path / "student/model.json").read_text()


def test_it_starts_from_the_functions_weights_and_normalisation(file):
    student, _ = start(f"{file}:plain")
    torch.manual_seed(5)
    assert torch.equal(student.module.conv.weight, torch.nn.Conv2d(3, 8, 3, 2, 1).weight)
    assert student.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert start(f"{file}:unnormalised")[0].mean.flatten().tolist() == pytest.approx([0.1] * 3)


@pytest.mark.parametrize("function", ["plain", "wide:3"])
def test_a_linear_layer_at_the_end_is_removed_and_one_under_a_softmax_is_left(file, function):
    names = {name for name, _ in start(f"{file}:{function}")[0].named_parameters()}
    assert not any("head" in name for name in names)
    assert any("head" in name for name, _ in start(f"{file}:probable")[0].named_parameters())


@pytest.mark.parametrize(("function", "reason"), [("grey", "RGB"), ("compiled", "compiled program")])
def test_a_network_that_cannot_be_a_student_is_refused(file, function, reason):
    with pytest.raises(ModelError, match=reason):
        start(f"{file}:{function}")


@pytest.mark.slow
def test_a_report_does_not_execute_a_file_that_only_the_folder_names(teacher, tmp_path):
    run = Run(task="digits:5-9", student="wrn_10_1", method="refilled", teacher=teacher, epochs=2, shots=8, threads=1)
    distill(run, tmp_path / "run")
    record = tmp_path / "run/run.toml"
    (tmp_path / "evil.py").write_text("open(__file__ + '.ran', 'w')")
    changed = record.read_text().replace('student = "wrn_10_1"', f'student = "{tmp_path / "evil.py"}:make"')
    assert "evil" in changed
    record.write_text(changed)
    CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert not (tmp_path / "evil.py.ran").exists()


def test_weights_that_the_file_froze_stay_and_are_counted(file):
    student, notes = start(f"{file}:frozen")
    assert notes[-1] == "own.py has frozen 4 tensors of the student, which stay as they are"
    assert {name for name, value in student.named_parameters() if value.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.slow
@pytest.mark.parametrize("function", ["plain", "probable", "of_timm"])
def test_it_is_exported(file, tmp_path, function):
    pytest.importorskip("onnxruntime")
    student, _ = start(f"{file}:{function}")
    assert write_onnx(student.eval(), tmp_path / "student.onnx", preprocess=True) < 1e-4


@pytest.mark.slow
def test_a_run_is_resumed_and_used_only_by_those_who_name_the_file(file, tmp_path, monkeypatch):
    run = run_of(f"{file}:plain")
    distill(run, tmp_path / "whole")
    with pytest.raises(Interrupted):
        distill(run, tmp_path / "stopped", display=Stopping(3))
    resume(tmp_path / "stopped", named={"student": f"{file}:plain"})
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    assert evaluate(tmp_path / "whole")["accuracy"] == Result.load(tmp_path / "whole").accuracy
    monkeypatch.setenv("REFILLED_CODE", "")
    with pytest.raises(RunError, match=r"own\.py, which loading it would execute.*REFILLED_CODE"):
        load_model(tmp_path / "whole")
    code = "import sys; from pathlib import Path; from refilled.models import load_model\n"
    code += "print(load_model(Path(sys.argv[1])).architecture)"
    trusting = {**os.environ, "REFILLED_CODE": os.pathsep.join(["/nowhere/own.py", str(file)])}
    command = [sys.executable, "-c", code, str(tmp_path / "whole")]
    done = subprocess.run(command, capture_output=True, text=True, env=trusting, check=True)
    assert done.stdout.strip() == "own.py:plain"
    monkeypatch.setenv("REFILLED_CODE", str(file))
    file.write_text(FILE + "# changed\n")
    with pytest.raises(ModelError, match="has changed since the student was trained"):
        load_model(tmp_path / "whole")
