"""Display of training progress: bars on a terminal, plain lines elsewhere, or nothing."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from refilled.words import count_of

_REDRAW = 0.2  # seconds; reading a loss value waits for the device, so not every step is shown


class Display:
    """A display of progress. The base class shows nothing."""

    def begin_stage(self, name: str, epochs: int, steps: int, done: int) -> None:
        """A stage of ``epochs`` times ``steps`` begins, or resumes after ``done`` steps."""

    def step(self, epoch: int, images: int, values: Mapping[str, Tensor]) -> None:
        """A step on ``images`` images is finished, with these loss values and statistics."""

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """An epoch ended."""

    def message(self, text: str) -> None:
        """A message for the user."""

    def close(self) -> None:
        """The end of the display."""


class _Rate:
    """Images per second since the last call."""

    def __init__(self) -> None:
        self.images, self.since = 0, time.monotonic()

    def __call__(self, now: float) -> float:
        rate = self.images / max(now - self.since, 1e-9)
        self.images, self.since = 0, now
        return rate


class Bars(Display):
    """One bar per stage, with the remaining time, images per second and the values of the last step."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}", markup=False),
            console=console,
        )
        self._progress.start()
        self._rate = _Rate()
        self._val = ""

    def begin_stage(self, name: str, epochs: int, steps: int, done: int) -> None:
        """Add a bar."""
        self._bar = self._progress.add_task(
            name, total=epochs * steps, completed=done, epoch=0, epochs=epochs, values=""
        )
        self._rate, self._val = _Rate(), ""

    def step(self, epoch: int, images: int, values: Mapping[str, Tensor]) -> None:
        """Advance the bar; update the values at most five times per second."""
        self._rate.images += images
        self._progress.advance(self._bar)
        now = time.monotonic()
        if now - self._rate.since > _REDRAW:
            shown = [f"{self._rate(now):.0f} images/s", *(f"{n} {v.item():.3g}" for n, v in values.items()), self._val]
            self._progress.update(self._bar, epoch=epoch + 1, values="  ".join(shown))

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """Show the validation accuracy and the epoch, which may have been too short for an update in :meth:`step`."""
        if "val_accuracy" in entry:
            self._val = f"val {entry['val_accuracy']:.1f} %"
        self._progress.update(self._bar, epoch=entry["epoch"])

    def message(self, text: str) -> None:
        """Print the message above the bars."""
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Stop updating; the bars stay on the terminal."""
        self._progress.stop()


class Lines(Display):
    """One plain line per epoch, at most one every five seconds, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rate = _Rate()
        self._epochs = 0

    def begin_stage(self, name: str, epochs: int, steps: int, done: int) -> None:
        """Print the stage."""
        self._epochs, self._rate = epochs, _Rate()
        self._print(f"stage {name}: {count_of(epochs, 'epoch')} of {count_of(steps, 'step')}")

    def step(self, epoch: int, images: int, values: Mapping[str, Tensor]) -> None:
        """Count the images."""
        self._rate.images += images

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """Print the means of the epoch, unless the last line is less than five seconds old."""
        now = time.monotonic()
        if now - self._rate.since < 5 and entry["epoch"] < self._epochs:
            return
        values = [f"{n} {v:.4g}" for n, v in entry.items() if n not in ("stage", "epoch")]
        self._print(f"  epoch {entry['epoch']}/{self._epochs}  {'  '.join(values)}  {self._rate(now):.0f} images/s")

    def message(self, text: str) -> None:
        """Print the message."""
        self._print(text)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Pace:
    """Messages about work on many images that has no bar: how many are done, images per second, the time left.

    Args:
        work: What is done, for the messages.
        total: The number of images.
        say: Called with each message.
        every: Seconds between two messages.
    """

    def __init__(self, work: str, total: int, say: Callable[[str], None], every: float = 10.0) -> None:
        self._work, self._total, self._say, self._every = work, total, say, every
        self._done, self._begun = 0, time.monotonic()
        self._said = self._begun

    def __call__(self, images: int) -> None:
        """Count images that are done; say so if the last message is old enough."""
        self._done += images
        now = time.monotonic()
        if now - self._said < self._every:
            return
        self._said, rate = now, self._done / (now - self._begun)
        left = max(self._total - self._done, 0)
        self._say(
            f"{self._work}: {self._done:,} of {self._total:,} images, {rate:,.0f} images/s"
            + (f", {duration(left / rate)} left" if left else "")
        )

    def leave_out(self, images: int) -> None:
        """Subtract images that turned out to be done already."""
        self._total -= images


def duration(seconds: float) -> str:
    """Return a time as text in a suitable unit."""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.1f} {name}"
    return count_of(round(seconds), "second")
