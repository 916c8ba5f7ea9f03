"""What --dry-run predicts: the arithmetic on costs put in by hand, and that nothing but words comes of it."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.compare.comparison import Comparison
from refilled.config import Run
from refilled.cost import comparison as of_comparisons
from refilled.cost import run as module
from refilled.cost import step as of_steps
from refilled.cost.comparison import forecast_comparison
from refilled.cost.run import communication, forecast
from refilled.cost.step import Cost, Line, Network, Probe
from refilled.data import TaskSize, load_task
from refilled.errors import MethodError
from refilled.models import create_model, save_model
from refilled.stages import Stage, Term
from refilled.training.loop import fit as real_fit

RUN = Run(task="digits:5-9", student="wrn_10_1", batch_size=16, epochs=10, threads=1, device="cpu")
SIZE = TaskSize(tuple("56789"), train=1000, val=100, test=200, image_size=16, augmentation="crop", images_per_second=50)
costs = st.floats(1e-3, 1e3)


@pytest.fixture
def known(monkeypatch):
    """Steps of 1 s and 0.1 s an image, passes of 0.01 s an image, 2 GB for a step and 1 MB an image of a pass.

    A step of the heads takes 0.002 s an image.
    """
    step, look = Cost(Line(1.0, 0.1), Line(2e9, 0.0)), Cost(Line(0.0, 0.01), Line(1e9, 1e6))
    monkeypatch.setattr(Probe, "step_cost", lambda *of, **more: step)
    monkeypatch.setattr(Probe, "head_step_seconds", lambda self, images: 0.002 * images)
    monkeypatch.setattr(module, "scoring_cost", lambda *of, **more: look)
    monkeypatch.setattr(module, "task_size", lambda *of, **more: SIZE)


@given(st.integers(1, 100), st.integers(1, 100), costs, costs)
def test_a_line_through_costs_that_grow_goes_through_both(size, step, cost, more):
    small, large = (size, cost), (size + step, cost + more)
    line = Line.through(small, large)
    assert line(large[0]) == pytest.approx(large[1])
    assert min(line.fixed, line.each) >= 0
    if cost / small[0] >= large[1] / large[0]:  # an image costs less in the larger batch, as it should
        assert line(small[0]) == pytest.approx(cost)


@given(st.integers(1, 100), st.integers(0, 100), costs, costs)
def test_noise_makes_no_part_of_a_cost_negative(size, step, less, cost):
    line = Line.through((size, less), (size + step, cost))
    assert line.fixed >= 0
    assert line.each >= 0
    assert line(size + step) == pytest.approx(cost)


def test_a_line_is_extrapolated_beyond_its_points():
    assert Line.through((8, 18.0), (32, 66.0))(128) == pytest.approx(2 + 2 * 128)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_gathering_brings_each_rank_every_part_but_its_own(ranks):
    size = 3e6
    received = sum(size / ranks for _ in range(ranks - 1))
    assert Network(bandwidth=1e6, latency=0).all_gather(size, ranks) == pytest.approx(received / 1e6)
    assert Network(bandwidth=1e6, latency=0).all_reduce(size, ranks) == pytest.approx(2 * received / 1e6)
    hops, reached = 0, 1
    while reached < ranks:  # along a tree, those that know double with every message
        hops, reached = hops + 1, 2 * reached
    assert Network(bandwidth=math.inf, latency=1.0).all_gather(size, ranks) == hops


def test_what_passes_between_ranks_is_what_the_losses_read():
    student, teacher = (create_model("wrn_10_1", 5, image_size=16) for _ in "st")
    network, batch = Network(bandwidth=1.0, latency=0.0), 12

    def bytes_of(**reads: str | None) -> float:
        stage = Stage("stage", {"term": Term(nn.Identity(), **reads)})
        return communication(student, [teacher], stage, batch, 2, network)

    gathered = 0.5 * 4 * batch  # bytes of a number of the embedding or the logits: half of them come from elsewhere
    least = bytes_of(student="logits", teacher=None)
    assert bytes_of(student="embedding", teacher=None) - least == pytest.approx(gathered * (64 - 5))
    assert bytes_of(student="logits", teacher="embedding") - least == pytest.approx(gathered * 64)
    summed = sum(p.numel() for p in student.parameters())  # gradients, and mean and variance there and back
    summed += 2 * 2 * sum(m.num_features for m in student.modules() if isinstance(m, nn.BatchNorm2d))
    assert least == pytest.approx(gathered * 5 + 4 * summed)
    assert communication(student, [teacher], Stage("stage", {}), batch, 1, network) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_a_forecast_adds_up(teacher):
    found = forecast(replace(RUN, method="refilled", teacher=teacher))
    steps = math.ceil(1000 / 16)
    assert [(stage.epochs, stage.steps) for stage in found.stages] == [(5, steps), (5, steps)]
    assert all(stage.seconds == pytest.approx(1 + 0.1 * 16) for stage in found.stages)
    validation = 10 * 100 * 0.01
    assert found.seconds == pytest.approx(
        {
            "loading": 1300 / 50,
            "embedding by the teacher": 500 * 0.01,  # by which the teacher is judged
            "training": 10 * steps * 2.6 + validation,
            "scoring": 2 * 1200 * 0.01,
        }
    )
    assert found.total == pytest.approx(sum(found.seconds.values()))
    assert found.memory == pytest.approx(2e9 + 1300 * 16 * 16 * 3)  # scoring's 1.256 GB come after the steps' 2


@pytest.mark.usefixtures("known")
def test_the_steps_of_the_heads_and_the_pass_before_them_are_counted(teacher):
    run = replace(RUN, method="regression", teacher=teacher)
    without, found = forecast(run), forecast(replace(run, head_steps=40))
    (stage,) = found.stages
    assert (stage.head_steps, stage.head_seconds) == (40, 0.002 * 16)
    training = found.seconds["training"] - without.seconds["training"]
    assert training == pytest.approx(1000 * 0.01 + 40 * 0.002 * 16)
    assert "after 40 steps of the heads, 32 ms each" in dict(found.rows()).values()
    (shared,) = forecast(replace(run, head_steps=40), ranks=4).stages  # each rank takes these steps with all images
    assert shared.head_seconds == stage.head_seconds


def test_a_step_of_the_heads_is_measured(teacher, monkeypatch):
    """By a clock on which all else takes equally long."""
    now = [0.0]

    def tick():
        now[0] += 1.0
        return now[0]

    def fit(student, teacher, task, stages, recipe, *rest, **options):
        now[0] += 0.5 * recipe.head_steps
        real_fit(student, teacher, task, stages, recipe, *rest, **options)

    monkeypatch.setattr(of_steps, "fit", fit)
    monkeypatch.setattr(of_steps, "perf_counter", tick)
    found = forecast(replace(RUN, method="regression", teacher=teacher, head_steps=40))
    assert found.stages[0].head_seconds == 0.5


@pytest.mark.usefixtures("known")
def test_a_readout_holds_the_embeddings_of_all_training_images(teacher):
    found = forecast(replace(RUN, method="linear_probe", student=None, teacher=teacher))
    assert found.memory == pytest.approx(1e9 + 256 * 1e6 + 1300 * 16 * 16 * 3 + 2 * 4 * 1000 * 64)


@pytest.mark.usefixtures("known")
def test_images_on_disk_take_no_memory():
    memory, disk = forecast(RUN), forecast(replace(RUN, image_memory=0.0))
    assert memory.memory - disk.memory == 1300 * 16 * 16 * 3
    assert "images on disk" in dict(disk.rows())
    assert "images on disk" not in dict(memory.rows())


@pytest.mark.usefixtures("known")
def test_the_cost_of_a_cached_teacher_counts_once(teacher):
    run = replace(RUN, method="rkd", teacher=teacher)
    live, cached = forecast(run), forecast(replace(run, views=3))
    taught = live.stages[0]  # the other stage trains the classifier alone
    saved = taught.epochs * taught.steps * 16 * 0.01 - 3 * 1000 * 0.01
    assert live.total - cached.total == pytest.approx(saved)


@pytest.mark.usefixtures("known")
def test_a_step_costs_the_students_pass_at_least_however_slow_its_teacher_was_measured(teacher, monkeypatch):
    slow, passes = (
        Cost(Line(0.0, 100.0), None),
        iter(range(3)),
    )  # the student's passes are measured before the teacher's
    known = module.scoring_cost
    monkeypatch.setattr(module, "scoring_cost", lambda *of, **more: known() if next(passes) < 2 else slow)
    found = forecast(replace(RUN, method="rkd", teacher=teacher, views=3))
    assert found.stages[0].seconds == pytest.approx(16 * 0.01)
    assert dict(found.rows())["stage embedding"]


@pytest.mark.usefixtures("known")
def test_ranks_share_the_images_and_pay_for_messages():
    alone, shared = (forecast(RUN, ranks=ranks).stages[0] for ranks in (1, 4))
    assert alone.communication == 0
    assert shared.communication > 0
    assert shared.seconds == pytest.approx(1 + 0.1 * 4 + shared.communication)
    assert shared.steps == alone.steps


def test_a_run_that_cannot_work_is_refused(teacher):
    with pytest.raises(MethodError, match="compares logits class by class"):
        forecast(replace(RUN, method="kd", teacher=teacher))


@pytest.mark.slow
def test_the_command_says_what_a_run_is_and_leaves_nothing_behind(tmp_path, monkeypatch, teacher):
    monkeypatch.chdir(tmp_path)
    arguments = ["distill", "digits:5-9", "--teacher", teacher, "--student", "wrn_10_1", "--threads", "1", "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert 'student = "wrn_10_1"' in result.output
    assert "in all" in result.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    task = load_task("digits:5-9")
    assert (found["size"]["train"], found["size"]["test"]) == (len(task.train), len(task.test))
    assert found["total"] > 0
    assert found["rates"]["teacher"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_memory_is_measured_and_extrapolated_to_more_images():
    # In a process of its own: memory that others have freed, but not given back, would be reused and not seen.
    script = """
import json, torch
from refilled.cost.step import _cost_of
def work(images):
    torch.ones(images * 2**22, dtype=torch.uint8)
    return 1.0
found = [_cost_of(f, (8, 32), torch.device("cpu")).memory for f in (lambda images: 1.0, work)]
print(json.dumps([None if m is None else [m.each, m(128)] for m in found]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    start, grown = json.loads(run.stdout)
    if start is None or grown is None:
        pytest.skip("this system does not tell the peak of a process")
    assert grown[0] == pytest.approx(2**22, rel=0.02)
    assert grown[1] == pytest.approx(start[1] + 128 * 2**22, rel=0.02)


def test_a_comparison_costs_what_its_unfinished_runs_cost(known, tmp_path, monkeypatch):
    monkeypatch.setattr(of_comparisons, "duration", lambda seconds: f"{seconds:.3f}")
    rows = {"alone": {"method": "vanilla"}, "taught": {"method": "regression"}}
    comparison = Comparison("digits", RUN, rows, range(4), replace(RUN, task="digits:0-4"))
    first, *others = forecast_comparison(comparison, tmp_path / "runs", jobs=2)
    assert not (tmp_path / "runs").exists()
    alone = forecast(RUN).total
    taught = float(re.fullmatch(r"  taught: 4 runs, ([\d.]+) each, .* GiB", others[2])[1])
    assert taught > alone
    assert others[0] == f"  teacher: {alone:.3f}"
    assert others[1].startswith(f"  alone: 4 runs, {alone:.3f} each, ")
    total = float(re.fullmatch(r"9 runs to do, about ([\d.]+) in 2 processes:", first)[1])
    assert total == pytest.approx(alone + (4 * alone + 4 * taught) / 2, abs=0.01)

    (tmp_path / "runs" / "alone-s1").mkdir(parents=True)
    (tmp_path / "runs" / "alone-s1" / "DONE").touch()
    (tmp_path / "runs" / "teacher").mkdir()
    save_model(create_model("wrn_10_1", 5, image_size=8), tmp_path / "runs" / "teacher")
    (tmp_path / "runs" / "teacher" / "DONE").touch()
    first, *others = forecast_comparison(comparison, tmp_path / "runs")
    assert first.startswith("7 runs to do, ")
    assert [line.split(",")[0] for line in others] == ["  alone: 3 runs", "  taught: 4 runs"]


@pytest.mark.slow
def test_the_command_of_a_comparison_says_what_it_would_cost(tmp_path):
    arguments = ["compare", "digits:5-9", "--teacher", "refilled/letters", "--student", "wrn_10_1", "--epochs", "2"]
    arguments += ["--methods", "vanilla,refilled:good", "--seeds", "2", "--out", str(tmp_path / "runs"), "--dry-run"]
    lines = CliRunner().invoke(app, arguments).output.splitlines()
    assert re.fullmatch(r"4 runs to do, about \d+ seconds in 1 process:", lines[0])
    assert [line.split(",")[0] for line in lines[1:]] == ["  vanilla: 2 runs", "  refilled:good: 2 runs"]
    assert not (tmp_path / "runs").exists()
