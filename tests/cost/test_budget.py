"""A time limit becomes a number of epochs before training."""

from types import SimpleNamespace

import pytest

from refilled.cli.options import seconds_of
from refilled.config import Run
from refilled.cost import budget
from refilled.cost.budget import within
from refilled.errors import RunError

RUN = Run(task="digits:5-9", student="wrn_10_1", epochs=7, least_steps=1000, threads=1, val=0.0)


def forecasting(monkeypatch, per_epoch: float, rest: float, stages: int = 1):
    """Let every run cost this number of seconds per epoch, and these for the rest."""

    def forecast(run):
        assert run.least_steps == 0  # which would add epochs
        seconds = {"training": run.epochs * per_epoch, "loading": rest}
        return SimpleNamespace(seconds=seconds, total=sum(seconds.values()), stages=(None,) * stages)

    monkeypatch.setattr(budget, "forecast", forecast)
    for clock in ("perf_counter", "process_time"):
        monkeypatch.setattr(budget, clock, lambda: 0.0)


@pytest.mark.parametrize(("limit", "epochs"), [(100, 8), (1000, 96), (30, 2)])
def test_as_many_epochs_as_fit_and_no_more(monkeypatch, limit, epochs):
    forecasting(monkeypatch, per_epoch=10, rest=9)
    run, line = within(RUN, limit)
    assert (run.epochs, run.least_steps) == (epochs, 0)
    assert 9 + 10 * epochs <= 0.97 * limit < 9 + 10 * (epochs + 1)
    assert f"{epochs} epochs of 10 seconds" in line


def test_a_limit_that_is_too_short_says_what_would_be_enough(monkeypatch):
    forecasting(monkeypatch, per_epoch=10, rest=9, stages=2)
    with pytest.raises(RunError, match=r"give --time-limit (\d+)s or more") as caught:
        within(RUN, 25)
    needed = int(str(caught.value).rpartition("--time-limit ")[2].split("s")[0])
    assert within(RUN, needed + 1)[0].epochs == 2


def test_a_real_run_has_a_longer_budget_for_a_longer_limit():
    assert within(RUN, 600)[0].epochs < within(RUN, 6000)[0].epochs


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("1.5H", 5400), ("2m5s", 125)]
)
def test_times_are_read_as_people_write_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "30 minutes", "-5m", "1m1h", "nan", "0s"])
def test_other_texts_are_refused(text):
    with pytest.raises(RunError, match="time"):
        seconds_of(text)
