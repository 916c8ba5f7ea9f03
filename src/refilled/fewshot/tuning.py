"""Hyper-parameters of a few-shot method, chosen on tasks of the validation classes and never on the unseen ones."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from refilled.data import queries_left
from refilled.errors import RunError, unknown
from refilled.fewshot.evaluation import load_side, make_bank, resolve, task_accuracies
from refilled.fewshot.methods import load_few_shot_method
from refilled.run import FewShotRun

_RANGE = re.compile(r"(\w+)=([^:,]+):([^:,]+)")
_CHOICE = re.compile(r"(\w+)=([^:,]+(?:,[^:,]+)+)")


class Span(NamedTuple):
    """Numbers between two bounds, searched on a logarithmic scale."""

    low: float
    high: float
    whole: bool


Space = Mapping[str, Span | tuple[str, ...]]


def parse_space(texts: Sequence[str]) -> Space:
    """Read ranges, ``c=0.01:100``, and choices, ``layers=all,classifier``.

    A range is of whole numbers if both of its bounds are written as such.

    Raises:
        RunError: a text is neither, or bounds are not positive and ascending.
    """
    space: dict[str, Span | tuple[str, ...]] = {}
    for text in texts:
        if choice := _CHOICE.fullmatch(text):
            space[choice[1]] = tuple(choice[2].split(","))
        elif found := _RANGE.fullmatch(text):
            space[found[1]] = _span(found[2], found[3], text)
        else:
            raise RunError(f"--tune {text}: must be NAME=LOW:HIGH or NAME=A,B,C")
    return space


def tune(
    run: FewShotRun, space: Space, *, trials: int, n_episodes: int, storage: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Search the space with Optuna for the settings with the best mean accuracy on tasks of the validation classes.

    The search is kept in ``storage``; one that was interrupted goes on when it is started again.

    Args:
        run: The test to tune for; its tasks are drawn from the validation classes instead.
        space: What to search.
        trials: Settings to try, those of an earlier start counted.
        n_episodes: Tasks to try each on.
        storage: The file that keeps the search.
        progress: Told about each trial.

    Returns:
        The run's settings with the best ones found.

    Raises:
        RunError: Optuna is not installed.
        MethodError: The method has no such parameter.
    """
    optuna = _optuna()
    method = load_few_shot_method(run.method)
    for name in space:
        if name not in method.parameters:
            raise RunError(f"--tune {name}: {unknown('parameter', name, method.parameters)}")
    run = resolve(replace(run, side="val", n_episodes=n_episodes))
    torch.set_num_threads(run.threads or torch.get_num_threads())
    pool = load_side(run)
    bank = make_bank(run, pool)  # shared by all trials, so that each image is embedded once
    run = replace(run, n_query=queries_left(pool.train.labels, run.n_shot, run.n_query))

    def accuracy(trial: Any) -> float:
        chosen = {name: _suggest(trial, name, what) for name, what in space.items()}
        learner = method.learner(bank, {**run.settings, **chosen})
        found: list[float] = []
        for first in range(0, n_episodes, run.batch):
            numbers = range(first, min(first + run.batch, n_episodes))
            found += task_accuracies(learner, pool.train.labels, numbers, run)
        progress(f"trial {trial.number + 1}: {mean(found):.2f} %  {chosen}")
        return mean(found)

    storage.parent.mkdir(parents=True, exist_ok=True)
    journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    study = optuna.create_study(
        storage=journal,
        study_name=run.method,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=run.seed),
        load_if_exists=True,
    )
    finished = len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
    study.optimize(accuracy, n_trials=max(0, trials - finished))
    return method.settle({**run.settings, **study.best_params})


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise RunError("tuning needs Optuna: pip install 'refilled[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _suggest(trial: Any, name: str, what: Span | tuple[str, ...]) -> Any:
    if not isinstance(what, Span):
        return trial.suggest_categorical(name, list(what))
    if what.whole:
        return trial.suggest_int(name, int(what.low), int(what.high), log=True)
    return trial.suggest_float(name, what.low, what.high, log=True)


def _span(low: str, high: str, text: str) -> Span:
    try:
        bounds = float(low), float(high)
    except ValueError:
        raise RunError(f"--tune {text}: the bounds must be numbers") from None
    if not (0 < bounds[0] < bounds[1] and math.isfinite(bounds[1])):
        raise RunError(f"--tune {text}: the bounds must be above 0 and ascend")
    return Span(*bounds, whole=low.isdigit() and high.isdigit())
