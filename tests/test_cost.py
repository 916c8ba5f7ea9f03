"""What --dry-run predicts: the arithmetic on costs put in by hand, and that nothing but words comes of it."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from refilled import cost as module
from refilled.cli import app
from refilled.cost import Cost, Line, Network, forecast
from refilled.data import TaskSize, load_task
from refilled.errors import MethodError
from refilled.experiment import distill
from refilled.models import create_model
from refilled.run import Run

RUN = Run(task="digits:5-9", student="wrn_10_1", batch_size=16, epochs=10, threads=1, device="cpu")
SIZE = TaskSize(tuple("56789"), train=1000, val=100, test=200, image_size=16, augmentation="crop", images_per_second=50)
costs = st.floats(1e-3, 1e3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    distill(replace(RUN, task="digits:0-4", epochs=1, shots=8), folder)
    return str(folder)


@pytest.fixture
def known(monkeypatch):
    """Steps of 1 s and 0.1 s an image, passes of 0.01 s an image, 2 GB for a step and 1 GB for a pass."""
    step, look = Cost(Line(1.0, 0.1), Line(2e9, 0.0)), Cost(Line(0.0, 0.01), Line(1e9, 0.0))
    monkeypatch.setattr(module, "step_cost", lambda *of, **more: step)
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


def test_a_line_is_followed_beyond_its_points():
    assert Line.through((8, 18.0), (32, 66.0))(128) == pytest.approx(2 + 2 * 128)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_communication_is_that_of_messages_around_a_ring(ranks):
    network, size = Network(bandwidth=1e6, latency=1e-3), 3e6
    message = size / ranks / network.bandwidth + network.latency
    # In a ring each rank hands a part on to its neighbour, ranks - 1 times until everyone has had all of them.
    around = sum(message for _ in range(ranks - 1))
    assert network.all_gather(size, ranks) == pytest.approx(around)
    assert network.all_reduce(size, ranks) == pytest.approx(2 * around)  # once to add up, once to tell


@pytest.mark.usefixtures("known")
def test_a_forecast_adds_up(teacher):
    found = forecast(replace(RUN, method="refilled", teacher=teacher))
    steps = math.ceil(1000 / 16)
    assert [(stage.epochs, stage.steps) for stage in found.stages] == [(5, steps), (5, steps)]
    assert all(stage.seconds == pytest.approx(1 + 0.1 * 16) for stage in found.stages)
    validation = 10 * 100 * 0.01
    assert found.seconds == pytest.approx(
        {"loading": 1300 / 50, "training": 10 * steps * 2.6 + validation, "scoring": 2 * 1200 * 0.01}
    )
    assert found.total == pytest.approx(sum(found.seconds.values()))
    outputs = 2 * 4 * 1000 * (64 + 5)
    assert found.memory == pytest.approx(2e9 + 1300 * 16 * 16 * 3 + outputs)


@pytest.mark.usefixtures("known")
def test_a_cached_teacher_is_paid_once(teacher):
    run = replace(RUN, method="rkd", teacher=teacher)
    live, cached = forecast(run), forecast(replace(run, views=3))
    taught = live.stages[0]  # the other stage trains the classifier alone
    saved = taught.epochs * taught.steps * 16 * 0.01 - 3 * 1000 * 0.01
    assert live.total - cached.total == pytest.approx(saved)


@pytest.mark.usefixtures("known")
def test_ranks_share_the_images_and_pay_for_messages():
    alone, shared = forecast(RUN), forecast(RUN, ranks=4)
    parameters = sum(p.numel() for p in create_model("wrn_10_1", 5, image_size=16).parameters())
    assert shared.stages[0].seconds == pytest.approx(1 + 0.1 * 4 + shared.communication)
    assert shared.communication == pytest.approx(
        Network().all_reduce(4 * parameters, 4) + Network().all_gather(2 * 4 * 16 * (64 + 5), 4)
    )
    assert alone.communication == 0
    assert shared.stages[0].steps == alone.stages[0].steps


def test_a_run_that_cannot_work_is_refused(teacher):
    with pytest.raises(MethodError, match="compares logits class by class"):
        forecast(replace(RUN, method="kd", teacher=teacher))


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


def test_the_memory_of_a_step_is_seen_to_grow_with_its_images(teacher):
    small, large = (forecast(replace(RUN, batch_size=batch, task="digits@size=48")) for batch in (8, 128))
    if small.memory is None:
        pytest.skip("this system does not tell the peak of a process")
    assert large.memory > small.memory + 120 * 48 * 48 * 16 * torch.finfo(torch.float32).bits / 8
