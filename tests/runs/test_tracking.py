"""Trackers of experiments receive each epoch once, also of a resumed run."""

import json
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.errors import RunError
from refilled.runs.tracking import STATE, Tracked, check_trackers
from refilled.training.journal import RunJournal
from refilled.training.progress import Display

TRAIN = ["train", "digits:0-4", "--model", "wrn_10_1", "--shots", "8", "--epochs", "3", "--threads", "1", "--quiet"]


def refilled(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)


@pytest.fixture
def stubs(monkeypatch):
    """Modules that record what they are sent."""
    sent = {"mlflow": [], "wandb": [], "trackio": []}

    def record(name):
        return lambda values, step: sent[name].append((step, values))

    started = SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    nothing = lambda *a, **k: started  # noqa: E731
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(
        set_experiment=nothing, start_run=nothing, log_params=nothing, end_run=nothing, log_metrics=record("mlflow")
    ))  # fmt: skip
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=nothing, finish=nothing, log=record(name)))
    return sent


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_run_sends_each_epoch_once(stubs, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = ["tensorboard", *stubs]
    flags = [part for name in names for part in ("--tracker", name)]
    folder, epoch = tmp_path / "run", RunJournal.epoch

    def stop_after_the_second(self, entry):
        epoch(self, entry)
        if entry["epoch"] == 2:
            raise RunError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(RunJournal, "epoch", stop_after_the_second)
        assert isinstance(CliRunner().invoke(app, [*TRAIN, "--out", str(folder), *flags]).exception, RunError)
    refilled("distill", "--resume", folder, "--quiet", *flags)  # begins again: no state was saved
    refilled("distill", "--resume", folder, "--quiet", *flags)  # finished: nothing is left to send
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    for name, sent in stubs.items():
        assert [step for step, _ in sent] == [1, 2, 3, 3], name
        assert [values["lr"] for _, values in sent[:3]] == [entry["lr"] for entry in log]
        assert sent[3][1]["result/accuracy"] == result["accuracy"]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    rates = events.Scalars("lr")
    assert [event.step for event in rates] == [1, 2, 3]
    assert [event.value for event in rates] == pytest.approx([entry["lr"] for entry in log])
    assert events.Scalars("result/accuracy")[0].value == pytest.approx(result["accuracy"])
    refilled(*TRAIN, "--out", folder, "--overwrite")
    assert not (folder / STATE).exists()
    assert not (folder / "tensorboard").exists()


def test_a_missing_tracker_gets_its_install_line_and_trains_nothing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RunError, match=r"pip install 'refilled\[wandb\]'"):
        check_trackers(["wandb"])
    failed = CliRunner().invoke(app, [*TRAIN, "--out", str(tmp_path / "run"), "--tracker", "wandb"])
    assert isinstance(failed.exception, RunError)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="did you mean 'mlflow'"):
        check_trackers(["mlfow"])


def test_a_tracker_that_fails_is_left_out_with_a_warning(stubs, monkeypatch, tmp_path):
    said = []
    shown = Display()
    monkeypatch.setattr(shown, "message", said.append)

    def fail(*arguments, **named):
        raise OSError("no network")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    (tmp_path / "run.toml").write_text("")
    (tmp_path / "log.jsonl").write_text('{"stage": "one", "epoch": 1, "lr": 0.1, "ce": 2.0}\n')
    tracked = Tracked(shown, tmp_path, ["wandb", "trackio"])
    tracked.epoch({"epoch": 1})
    tracked.epoch({"epoch": 1})
    assert len(said) == 1
    assert "no network" in said[0]
    assert stubs["trackio"] == [(1, {"lr": 0.1, "one/ce": 2.0})]
