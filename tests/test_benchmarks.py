"""The benchmarks still run, and show what they promise."""

import subprocess
import sys
from pathlib import Path

import pytest

from refilled.methods import list_methods, load_method

FOLDER = Path(__file__).parents[1] / "benchmarks"


def output_of(name: str, *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_step_benchmark_has_a_row_for_every_method_that_trains_a_student_of_a_teacher():
    rows = {line[:24].strip() for line in output_of("step.py", "--quick").splitlines()}
    methods = {name: load_method(name) for name in list_methods()}
    of_a_teacher = {name for name, method in methods.items() if method.takes_student and method.takes_teacher}
    assert of_a_teacher - rows == {"refilled"}
    assert rows >= {"student alone", "stage 1", "stage 2", "stage 1, cache", "stage 1, float32", "authors' stage 1"}


@pytest.mark.slow
def test_the_step_benchmark_takes_networks_of_timm_at_their_sizes():
    pytest.importorskip("timm.task")
    networks = ["--students", "timm/test_resnet", "--teacher", "timm/test_vit", "--image-size", "160"]
    lines = output_of("step.py", "--quick", *networks, "--methods", "kd").splitlines()
    rows = {line[:24].strip() for line in lines}
    assert "timm/test_resnet taught by timm/test_vit, 160 px, batch 8, 1 rounds" in lines
    assert rows >= {"kd", "kd, cache", "student, float32", "timm KD, plain", "timm KD, f32", "timm KD, bf16"}
    assert not rows & {"regression", "crd"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["small", "photographs"])
def test_the_data_benchmark_compares_with_torchvision(kind):
    lines = output_of("data.py", "--quick", "--kinds", kind).splitlines()
    rates = {line[:24].strip(): line.split() for line in lines if line.startswith(("first", "later", "torchvision"))}
    assert list(rates) == ["first epoch", "later epochs", "torchvision, 0 workers"]
    assert float(rates["later epochs"][-1]) > 0


@pytest.mark.slow
def test_the_mining_benchmark_runs():
    lines = output_of("mining.py", "--sizes", "32", "--dims", "8", "--runs", "1").splitlines()
    assert lines[-1].split()[:2] == ["32", "8"]


@pytest.mark.slow
def test_the_cost_benchmark_predicts_and_models():
    lines = output_of("cost.py", "--quick").splitlines()
    assert [line.split()[2] for line in lines if line.startswith("      wrn_16_1")] == ["batch", "image"]
    assert [line.split()[2] for line in lines if line.lstrip().startswith(("1,000", "21,841"))] == ["1", "8", "64"] * 2


@pytest.mark.slow
def test_the_benchmark_of_large_data_goes_through_all_phases(tmp_path):
    phases = ["make the shards", "load, first time", "load again", "channel statistics", "an epoch of batches"]
    lines = output_of("large.py", "--images", "600", "--folder", str(tmp_path)).splitlines()
    assert [line[:24].strip() for line in lines[2:]] == [*phases, "50 training steps"]
    assert len(list(tmp_path.glob("cache/images/*/images.u8"))) == 3  # train, val and test


def test_the_list_of_equivalent_mutants_names_mutants(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import mutants

    names = {mutant.name for module in mutants.MUTATED for mutant in mutants.mutants_of(module)}
    assert mutants.equivalents().keys() <= names


@pytest.mark.slow
def test_a_mutant_is_killed_once(tmp_path):
    known = ["--modules", "distances", "--sample", "1", "--results", str(tmp_path / "mutants.jsonl")]
    *_, total = (line for line in output_of("mutants.py", *known).splitlines() if line.startswith("| all"))
    assert total == "| all | 1 | 1 | 0 | 1 | 0 | 100.0 % |"
    assert "1/1" not in output_of("mutants.py", *known, "--summary")
