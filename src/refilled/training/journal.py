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

from refilled.files import append, write_atomic
from refilled.models import Backbone
from refilled.stages import Stage
from refilled.training.checkpoints import State, load_state, refusing_another_state, save_state
from refilled.training.distributed import ALONE, World
from refilled.training.loop import Position
from refilled.training.progress import Display


class Interrupted(BaseException):
    """A signal asked the run to end, and its state has been saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[int]]:
        """Let it travel between processes, which remake an exception from its text otherwise."""
        return Interrupted, (self.number,)


class RunJournal:
    """A :class:`~refilled.training.loop.Journal` kept in a run's folder.

    The log holds only what a repeated run would give again. How far it had come is part of every saved state, so
    that a run which resumes from there continues the log exactly.

    Args:
        folder: The run's folder.
        display: Where progress is shown.
        seconds_between_saves: A state is saved when this time has passed since the last one.
        world: The processes that train together. Each has a journal; that of rank 0 alone touches the folder.
    """

    def __init__(
        self, folder: Path, display: Display, seconds_between_saves: float = 60.0, world: World = ALONE
    ) -> None:
        self.folder, self.display, self.interval, self.world = folder, display, seconds_between_saves, world
        self.warnings: list[str] = []
        self._log_path = folder / "log.jsonl"
        self._seconds_before = 0.0  # of training, in earlier processes
        self._started = self._saved = time.monotonic()
        self._signal = 0  # that came to this process
        self._ending = 0  # that came to some process, and all have agreed to end by

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self._seconds_before + time.monotonic() - self._started

    def restore(self) -> State | None:
        """Load the newest whole state and cut the log back to where it stood then."""
        state = self.world.lead(self._load)
        if state:
            with refusing_another_state():
                self._seconds_before = float(state.data.get("seconds", 0.0))
        self._started = self._saved = time.monotonic()
        return state

    def _load(self) -> State | None:
        state, problems = load_state(self.folder)
        self.warnings = [f"{problem}; training resumed from the state before it" for problem in problems]
        for warning in self.warnings:
            self.display.message(f"warning: {warning}")
        with refusing_another_state():
            size = int(state.data.get("log_bytes", 0)) if state else 0
        self._log_path.touch()
        os.truncate(self._log_path, size)
        return state

    def checkpoint_due(self) -> bool:
        """Whether a signal came or enough time has passed, here or in another process."""
        late = time.monotonic() - self._saved >= self.interval
        self._ending, due = self.world.largest(self._signal, self._signal > 0 or late)
        return bool(due)

    def save(self, state: State) -> None:
        """Write the state; after a signal, end the run."""
        self.world.lead(lambda: self._write(state))
        self._saved = time.monotonic()
        if self._ending:
            raise Interrupted(self._ending)

    def _write(self, state: State) -> None:
        data = {"log_bytes": self._log_path.stat().st_size, "seconds": self.seconds}
        save_state(self.folder, state.tensors, {**state.data, **data})

    def begin_stage(self, stage: Stage, epochs: int, steps: int, done: int) -> None:
        """Show it."""
        self.display.begin_stage(stage.name, epochs, steps, done)

    def step(self, position: Position, images: int, values: Mapping[str, Tensor]) -> None:
        """Show it."""
        self.display.step(position.epoch, images, values)

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the log."""
        if not self.world.leads:
            return
        append(self._log_path, json.dumps(entry) + "\n")
        self.display.epoch(entry)

    def end_stage(self, stage: Stage, student: Backbone) -> None:
        """Keep the student as this stage leaves it, for measures and pictures of what the stage did."""
        if not self.world.leads:
            return
        stages = self.folder / "stages"
        stages.mkdir(exist_ok=True)
        weights = {name: value.contiguous() for name, value in student.state_dict().items()}
        write_atomic(stages / f"{stage.name}.safetensors", save(weights))

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Turn SIGTERM and SIGINT into a saved state and :class:`Interrupted`; a second SIGINT ends at once."""

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
