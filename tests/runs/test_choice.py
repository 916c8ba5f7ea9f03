"""The measured precision of timm students."""

from dataclasses import replace

import pytest
import torch

from refilled.config import Run
from refilled.models import create_model
from refilled.runs import choice, prepared
from refilled.runs.choice import choose_precision, is_measured
from refilled.runs.experiment import complete
from refilled.runs.folder import RunFolder

RUN = Run(task="digits:5-9", student="timm/test_resnet", method="vanilla", epochs=1, batch_size=20, shots=8, threads=1)


@pytest.fixture(autouse=True)
def bf16_cpu(monkeypatch, tmp_path):
    """Run on a CPU with bfloat16, whatever the hardware, and keep choices in a folder of the test."""
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepared, "find_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(prepared, "resolve_precision", lambda asked, device: "bf16-mixed" if asked == "auto" else asked)


def slow_in(monkeypatch, slow):
    seconds = {"32-true": 1.0, "bf16-mixed": 1.0, slow: 2.0}
    monkeypatch.setattr(choice, "step_seconds", lambda student, size: seconds)


@pytest.mark.parametrize(("slow", "chosen"), [("32-true", "bf16-mixed"), ("bf16-mixed", "32-true")])
def test_the_faster_precision_is_recorded_and_stays(monkeypatch, tmp_path, slow, chosen):
    slow_in(monkeypatch, slow)
    result = complete(RUN, tmp_path / "run")
    assert RunFolder(tmp_path / "run").run().precision == result.hardware["precision"] == chosen
    slow_in(monkeypatch, chosen)
    assert complete(RUN, tmp_path / "run") == result
    complete(replace(RUN, seed=1), tmp_path / "other")  # another row with this student
    assert RunFolder(tmp_path / "other").run().precision == chosen


@pytest.mark.parametrize("change", [{"student": "wrn_10_1"}, {"precision": "bf16-mixed"}, {"views": 2}], ids=str)
def test_what_is_known_is_not_measured(change):
    run = replace(RUN, **change)
    assert is_measured(RUN, prepared.resolve(RUN))
    assert not is_measured(run, prepared.resolve(run))


def test_measuring_changes_neither_student_nor_random_numbers(monkeypatch):
    monkeypatch.setattr(choice, "_SECONDS", 0.0)
    student = create_model("timm/test_resnet", 5, image_size=16)
    before, random = {name: value.clone() for name, value in student.state_dict().items()}, torch.get_rng_state()
    assert choose_precision(student, 32) in ("32-true", "bf16-mixed")
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in student.parameters())
