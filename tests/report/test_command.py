"""The command in a report repeats its run."""

import shlex
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from refilled.cli import train as module
from refilled.cli.app import app
from refilled.config import WHERE, Run
from refilled.report.page import _command


@pytest.mark.parametrize(
    "run",
    [
        Run(task="digits:5-9", student="wrn_10_1", epochs=3, seed=2, balance="logits"),
        Run(task="a folder", student="wrn_10_1", teacher="refilled/letters", method="refilled", guard=True, shots=2),
        Run(task="digits", student="wrn_10_1", teacher="x.py:load", method="rkd", settings={"angle_weight": "7.0"}),
    ],
    ids=["train", "distill", "settings"],
)
def test_it_is_the_run_that_it_was_written_for(run, monkeypatch):
    begun = []
    monkeypatch.setattr(module, "_distill", lambda run, *_: begun.append(run))
    program, *arguments = shlex.split(_command(run))
    assert program == "refilled"
    assert CliRunner().invoke(app, arguments).exit_code == 0
    (again,) = begun
    places = {name: getattr(run, name) for name in WHERE}
    assert replace(again, **places) == run
