"""The measured precision of timm students."""

from dataclasses import replace

import pytest
import torch

from refilled.config import Run
from refilled.models import create_model, freeze
from refilled.runs import choice, prepared
from refilled.runs.choice import choose_precision, forward_seconds, is_measured
from refilled.runs.experiment import complete, distill
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
    result = distill(RUN, tmp_path / "run")
    assert RunFolder(tmp_path / "run").run().precision == result.hardware["precision"] == chosen
    slow_in(monkeypatch, chosen)
    assert complete(RUN, tmp_path / "run") == result
    distill(replace(RUN, seed=1), tmp_path / "other")  # another run with this student
    assert RunFolder(tmp_path / "other").run().precision == chosen


@pytest.mark.slow
def test_the_runs_of_a_grid_are_not_measured_and_compute_alike(monkeypatch, tmp_path):
    slow_in(monkeypatch, "bf16-mixed")
    complete(RUN, tmp_path / "alone")
    complete(replace(RUN, method="refilled", teacher="refilled/letters"), tmp_path / "taught")
    assert {RunFolder(tmp_path / name).run().precision for name in ("alone", "taught")} == {"bf16-mixed"}


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


@pytest.mark.parametrize(
    ("student", "teacher", "chosen"), [(1, 3, "bf16-mixed"), (1, 0.1, "32-true"), (-1, -9, "bf16-mixed")]
)
def test_a_live_teacher_counts_where_the_student_would_be_faster_in_float32(monkeypatch, student, teacher, chosen):
    """Seconds that bfloat16 costs the student and saves the teacher, on top of ten each."""
    timed = []

    def forward_seconds(network, size):
        timed.append(network)
        return {"32-true": 10.0 + teacher, "bf16-mixed": 10.0}

    monkeypatch.setattr(choice, "step_seconds", lambda *_: {"32-true": 10.0, "bf16-mixed": 10.0 + student})
    monkeypatch.setattr(choice, "forward_seconds", forward_seconds)
    learner, master = (create_model(name, 5, image_size=16) for name in ("timm/test_resnet", "wrn_10_1"))
    assert choose_precision(learner, 32, [master]) == chosen
    assert timed == ([master] if student > 0 else [])
    assert choose_precision(learner, 32) == ("32-true" if student > 0 else "bf16-mixed")
    assert choose_precision(learner, 32, [master]) == chosen  # kept
    assert len(timed) <= 1


def test_timing_a_teacher_leaves_it_and_the_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(choice, "_SECONDS", 0.0)
    teacher = freeze(create_model("wrn_10_1", 5, image_size=16))
    before, random = {name: value.clone() for name, value in teacher.state_dict().items()}, torch.get_rng_state()
    seconds = forward_seconds(teacher, 600)  # images so large that one is timed for all 32
    assert all(value > 0 for value in seconds.values())
    assert set(seconds) == {"32-true", "bf16-mixed"}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
