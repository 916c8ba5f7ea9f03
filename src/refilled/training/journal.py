"""The record of a run in its folder: ``log.jsonl``, the saved state, and the student as each stage left it."""

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors.torch import save
from torch import Tensor

from refilled.files import write_atomic
from refilled.models import Backbone
from refilled.stages import Stage
from refilled.training.checkpoints import State, load_state, save_state
from refilled.training.distributed import ALONE, World
from refilled.training.loop import Position
from refilled.training.progress import Display


class Interrupted(BaseException):
    """A signal requested the end of the run. Its state has been saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[int]]:
        """Rebuild the exception from its number in another process; the default would pass the text."""
        return Interrupted, (self.number,)


class RunJournal:
    """A :class:`~refilled.training.loop.Journal` in the folder of a run.

    The log contains only what a repetition of the run would reproduce, so no times. A saved state includes the length
    of the log, so a resumed run continues the log exactly.

    Args:
        folder: The folder of the run.
        display: Shows the progress.
        seconds_between_saves: Minimum time between two saved states.
        world: The processes that train together. Each has a journal; only that of rank 0 writes to the folder.
    """

    def __init__(
        self, folder: Path, display: Display, seconds_between_saves: float = 60.0, world: World = ALONE
    ) -> None:
        self.folder, self.display, self.interval, self.world = folder, display, seconds_between_saves, world
        self.warnings: list[str] = []
        self._log_path = folder / "log.jsonl"
        self._seconds_before = 0.0  # of training in earlier processes
        self._started = self._saved = time.monotonic()
        self._signal = 0  # number of the signal that this process received
        self._ending = 0  # number of a signal that any process received, after which all end

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including those before an interruption."""
        return self._seconds_before + time.monotonic() - self._started

    def restore(self) -> State | None:
        """Load the newest valid state and truncate the log to its length at that time."""
        state = self.world.lead(self._load)
        if state:
            self._seconds_before = float(state.data.get("seconds", 0.0))
        self._started = self._saved = time.monotonic()
        return state

    def _load(self) -> State | None:
        state, problems = load_state(self.folder)
        self.warnings = [f"{problem}; training resumed from the state before it" for problem in problems]
        for warning in self.warnings:
            self.display.message(f"warning: {warning}")
        self._log_path.touch()
        os.truncate(self._log_path, int(state.data.get("log_bytes", 0)) if state else 0)
        return state

    def checkpoint_due(self) -> bool:
        """Whether this process or another one received a signal, or enough time has passed."""
        late = time.monotonic() - self._saved >= self.interval
        self._ending, due = self.world.largest(self._signal, self._signal > 0 or late)
        return bool(due)

    def save(self, state: State) -> None:
        """Write the state. After a signal, raise :class:`Interrupted`."""
        self.world.lead(lambda: self._write(state))
        self._saved = time.monotonic()
        if self._ending:
            raise Interrupted(self._ending)

    def _write(self, state: State) -> None:
        data = {"log_bytes": self._log_path.stat().st_size, "seconds": self.seconds}
        save_state(self.folder, state.tensors, {**state.data, **data})

    def begin_stage(self, stage: Stage, epochs: int, steps: int, done: int) -> None:
        """Show the stage."""
        self.display.begin_stage(stage.name, epochs, steps, done)

    def step(self, position: Position, images: int, values: Mapping[str, Tensor]) -> None:
        """Show the step."""
        self.display.step(position.epoch, images, values)

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the log, and show the epoch."""
        if not self.world.leads:
            return
        with self._log_path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        self.display.epoch(entry)

    def end_stage(self, stage: Stage, student: Backbone) -> None:
        """Save the student at the end of the stage, to measure and picture the effect of the stage."""
        if not self.world.leads:
            return
        stages = self.folder / "stages"
        stages.mkdir(exist_ok=True)
        weights = {name: value.contiguous() for name, value in student.state_dict().items()}
        write_atomic(stages / f"{stage.name}.safetensors", save(weights))

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Turn SIGTERM and SIGINT into a saved state and :class:`Interrupted`. A second SIGINT ends immediately."""

        def note(number: int, frame: FrameType | None) -> None:
            if self._signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
