"""Work carried out by Ray on this machine: a lost worker is made good, and errors are those of the runs."""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.config import Run
from refilled.errors import MethodError, RunError
from refilled.grid.cache_building import build_cache_together
from refilled.grid.executors import find_executor
from refilled.grid.runner import run_grid
from refilled.runs.experiment import distill
from refilled.runs.result import Result
from refilled.runs.teacher_caches import find_cache

RUN = Run(task="digits:5-9", student="wrn_10_1", epochs=1, batch_size=20, shots=8, threads=1, device="cpu")

KILL_ONCE = """
import os, signal
from pathlib import Path
from torch import nn
from refilled.stages import Stage, Term

def kill_once(grave):
    if not Path(grave).exists():
        Path(grave).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)

def deadly(student, teacher, *, grave: str = ""):
    "Kill the process that builds it, the first time."
    kill_once(grave)
    return [Stage("classifier", {"ce": Term(nn.CrossEntropyLoss())})]

class Extractor(nn.Module):
    def forward_features(self, images):
        if len(images) == 80:  # those of the task, and not the probe of an unknown module
            kill_once("cache grave")
        return images

def teacher():
    return Extractor()
"""


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    """An executor whose one Ray, with one worker, all tests of this file share; relative paths start in its folder."""
    pytest.importorskip("ray")
    folder, before = tmp_path_factory.mktemp("ray"), Path.cwd()
    os.chdir(folder)
    Path("deadly.py").write_text(KILL_ONCE)
    os.environ["REFILLED_CACHE"], cache = str(folder / "cache"), os.environ.get("REFILLED_CACHE")
    with find_executor("ray")(1) as pool:
        yield lambda jobs: nullcontext(pool)
    os.chdir(before)
    os.environ.pop("REFILLED_CACHE") if cache is None else os.environ.update(REFILLED_CACHE=cache)


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_a_failed_run_does_not_affect_the_others(ray, tmp_path):
    runs = {
        "alive": RUN,
        "killed": replace(RUN, method="deadly.py", settings={"grave": "run grave"}),
        "wrong": replace(RUN, method="rkd"),
    }
    failures: dict[str, Exception] = {}
    found = run_grid(runs, Path("runs"), on_failure=lambda name, error: failures.update({name: error}), executor=ray)
    assert list(found) == ["alive", "killed"]
    assert int(Path("run grave").read_text()) != os.getpid()
    assert found["killed"].accuracy == found["alive"].accuracy == distill(RUN, tmp_path / "here").accuracy
    assert Result.load(Path("runs/killed")) == found["killed"]
    assert isinstance(failures["wrong"], MethodError)
    assert "learns from a teacher" in str(failures["wrong"]).splitlines()[0]


@pytest.mark.slow
def test_a_cache_resumes_where_a_killed_worker_left_it(ray):
    run = replace(RUN, teacher="deadly.py:teacher", teacher_mean=(0.5,) * 3, teacher_std=(0.5,) * 3, shots=16, views=3)
    built = build_cache_together(run, 2, ray)
    assert int(Path("cache grave").read_text()) != os.getpid()
    assert built.folder == find_cache(run).folder
    assert built.problems() == {}


@pytest.mark.slow
def test_a_missing_ray_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"pip install 'refilled\[ray\]'"):
        find_executor("ray")


@pytest.mark.slow
def test_an_unknown_executor_is_reported_before_anything_begins(tmp_path):
    result = CliRunner().invoke(app, ["compare", "digits", "--executor", "rya", "--out", str(tmp_path / "runs")])
    assert isinstance(result.exception, RunError)
    assert "unknown executor 'rya'; did you mean 'ray'?" in str(result.exception)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_ray_is_not_loaded_unless_it_is_asked_for():
    script = (
        "import sys; from refilled.grid.executors import find_executor; import refilled.grid.runner;"
        "find_executor('local'); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
