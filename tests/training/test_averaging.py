"""Optimisers and the average of weights: against plain arithmetic, and exact when a run is continued."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from refilled.config import Run
from refilled.errors import RunError
from refilled.recipe import Recipe
from refilled.runs.experiment import complete, distill, resume
from refilled.runs.prepared import Prepared, resolve
from refilled.runs.teacher_caches import fabric_of
from refilled.training.averaging import WeightAverage
from refilled.training.journal import Interrupted
from refilled.training.loop import Journal, fit
from stopping import Stopping, check_continues_exactly, weights

QUICK = Run(task="digits:5-9", student="wrn_10_1", epochs=4, batch_size=20, shots=8, threads=1, precision="32-true")


@pytest.mark.slow
def test_a_run_with_adamw_and_an_average_stopped_at_any_step_continues_exactly(teacher, tmp_path):
    changes = {"optimizer": "adamw", "lr": 1e-3, "ema": 0.9, "settings": {"regression_weight": 1.0}}
    run = replace(QUICK, method="refilled", teacher=teacher, **changes)
    check_continues_exactly(run, tmp_path, (1, 4, 5, 7))  # two steps per epoch, two epochs per stage


def test_the_average_is_that_of_a_slow_reference():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    average = WeightAverage(network, decay=0.5)
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    for update in range(1, 9):
        for parameter in network.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        network(torch.randn(2, 3, 8, 8))
        decay = min(0.5, (1 + update) / (10 + update))
        for name, value in network.state_dict().items():
            expected[name] = (
                decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
            )
        average.update()
    for name, value in average.values.items():
        torch.testing.assert_close(value, expected[name])
    own = {name: value.clone() for name, value in network.state_dict().items()}
    with average.in_place():
        assert all(torch.equal(value, average.values[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(value, own[name]) for name, value in network.state_dict().items())


def test_the_student_is_the_average_of_the_weights_that_plain_training_passes_through():
    """Scoring the held-out images in between, by the average, does not disturb training."""
    seen = []

    def train(ema: float):
        prepared = Prepared(resolve(replace(QUICK, ema=ema, val=0.2)))
        state = prepared.student.state_dict

        class Watching(Journal):
            def step(self, position, images, values):
                if ema == 0:
                    seen.append({name: value.clone() for name, value in state().items()})

        begin = {name: value.clone() for name, value in state().items()}
        run = prepared.run
        fit(prepared.student, None, prepared.task, prepared.stages, run, fabric_of(run), Watching())
        return begin, state()

    expected, _ = train(0.0)
    _, averaged = train(0.9)
    for update, passed in enumerate(seen, start=1):
        decay = min(0.9, (1 + update) / (10 + update))
        for name, value in passed.items():
            expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
    for name, value in averaged.items():
        torch.testing.assert_close(value, expected[name])


YOUNGER = ['optimizer = "sgd"\n', "ema = 0.0\n", "head_steps = 0\n"]
YOUNGER += ['auto_augment = "none"\n', "color_jitter = 0.0\n", "random_erasing = 0.0\n"]


@pytest.mark.slow
def test_a_run_begun_before_the_fields_existed_is_continued(tmp_path):
    run = QUICK
    distill(run, tmp_path / "whole")
    for name, go_on in (("a", resume), ("b", lambda folder: complete(run, folder))):
        with pytest.raises(Interrupted):
            distill(run, tmp_path / name, display=Stopping(3))
        record = tmp_path / name / "run.toml"
        older = record.read_text()
        for line in YOUNGER:
            assert line in older
            older = older.replace(line, "")
        record.write_text(older)
        go_on(tmp_path / name)
        assert weights(tmp_path / name) == weights(tmp_path / "whole")


def test_a_rate_for_sgd_is_refused_for_adamw():
    with pytest.raises(RunError, match=r"lr = 0\.1 is a learning rate for SGD; AdamW needs about 0\.001"):
        Recipe(optimizer="adamw")
    with pytest.raises(RunError, match="ema = 1"):
        Recipe(ema=1.0)
