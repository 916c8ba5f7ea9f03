"""A run that is stopped in the middle."""

import os
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest

from refilled.config import Run
from refilled.runs.experiment import distill, resume
from refilled.training.journal import Interrupted
from refilled.training.progress import Display


class Stopping(Display):
    """Sends this process SIGTERM after some steps, as a scheduler would."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def step(self, *arguments: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def weights(folder: Path) -> bytes:
    """Return the weights of a finished run's student."""
    return (folder / "model.safetensors").read_bytes()


def check_continues_exactly(run: Run, folder: Path, steps: Iterable[int]) -> None:
    """Check that a run which is stopped after any of these steps ends as one that is not stopped."""
    distill(run, folder / "whole")
    for step in steps:
        stopped = folder / str(step)
        with pytest.raises(Interrupted):
            distill(run, stopped, display=Stopping(step))
        resume(stopped)
        assert weights(stopped) == weights(folder / "whole"), f"stopped after step {step}"
        assert (stopped / "log.jsonl").read_text() == (folder / "whole/log.jsonl").read_text()
