"""The number of epochs that fit a time limit."""

import math
from dataclasses import replace
from time import perf_counter, process_time

from refilled.config import Run
from refilled.cost.run import forecast
from refilled.errors import RunError
from refilled.training.progress import duration
from refilled.words import count_of

_RESERVE = 0.03  # share of the limit for work that a forecast does not include: start, saving, the report
_EPOCHS = 100  # epochs of the forecast; with many, rounding to whole epochs per stage does not matter


def within(run: Run, seconds: float) -> tuple[Run, str]:
    """Return the run with the largest number of epochs that fits a time limit, and a line about this choice.

    The number is fixed before training. The schedule of the learning rate is therefore completed, and a resumed run has
    the same number. The limit includes loading, embedding by the teacher and scoring.

    Args:
        run: The run; its own number of epochs is ignored.
        seconds: The time limit.

    Raises:
        RunError: Not one epoch per stage fits.
        RefilledError: The run has another fault that can be found before training.
    """
    start = perf_counter() - process_time()  # what the process has done so far is mostly imports
    cost = forecast(replace(run, epochs=_EPOCHS, least_steps=0))
    per_epoch, stages = cost.seconds["training"] / _EPOCHS, max(1, len(cost.stages))
    rest = cost.total - cost.seconds["training"] + perf_counter() - start
    epochs = math.floor((seconds * (1 - _RESERVE) - rest) / max(per_epoch, 1e-6))
    if epochs < stages:
        needed = math.ceil((rest + stages * per_epoch) / (1 - _RESERVE))
        raise RunError(
            f"no training fits {duration(seconds)}: loading, embedding by the teacher and scoring take about "
            f"{duration(rest)}, an epoch {duration(per_epoch)}; give --time-limit {needed}s or more"
        )
    training = f"{count_of(epochs, 'epoch')} of {per_epoch:.2g} seconds"
    line = f"{duration(seconds)}: {training}, and {duration(rest)} for the rest"
    return replace(run, epochs=epochs, least_steps=0), line
