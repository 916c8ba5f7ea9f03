"""Choose parameters by accuracy on held-out training images, then train once on all training images.

Each trial is a run in its own folder, scored on the held-out part of the training images. Only the final run is scored
on the test images, as in the ReFilled paper. Several processes may share the journal of trials: each resumes abandoned
trials, then starts new ones, and the last process to finish carries out the final run.

A tuning folder holds ``tuning.toml`` (the run and the search), ``journal.log`` (Optuna's journal), ``trials/<number>``,
and ``best/<number>``, the final run with the values of that trial.
"""

import tomllib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError

from refilled.config import Run
from refilled.errors import NonFiniteError, RunError, unknown
from refilled.files import alone, read_toml, write_atomic
from refilled.methods import load_method
from refilled.recipe import Recipe
from refilled.runs.experiment import check, complete
from refilled.runs.prepared import resolve
from refilled.runs.result import Result
from refilled.training.checkpoints import hold
from refilled.tuning.search_space import import_optuna, parse_values
from refilled.tuning.study import open_study
from refilled.words import count_of

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

OnTrial = Callable[[int, Mapping[str, Any], float | None], None]
_MANY = 10_000  # more trials than any study has, so that seeds of trials differ between seeds of runs


@dataclass(frozen=True)
class Tuned:
    """The result of tuning."""

    values: Mapping[str, Any]
    """Best values of the searched parameters."""

    val_accuracy: float
    """Accuracy of their trial on the held-out images, in percent. It is the best of many, so it is biased upwards."""

    result: Result
    """Result of the run with these values on all training images, scored on the test images."""

    folder: Path
    """Folder of that run."""


def tune(
    run: Run, search: Mapping[str, str], trials: int, folder: Path, on_trial: OnTrial = lambda *trial: None
) -> Tuned | None:
    """Search for good values of a run's parameters, and carry out the run with them.

    A second call with the same arguments resumes. With more ``trials``, there is another final run if they found better
    values. The test images never decide which values are best.

    Args:
        run: The run that all trials share. Its ``val`` is the fraction of the training images that is held out.
        search: By name of a parameter of the method or a field of :class:`~refilled.recipe.Recipe`, the values to try;
            see :mod:`refilled.tuning.search_space`.
        trials: Number of trials, including those of earlier calls and of other processes.
        folder: Folder of the tuning.
        on_trial: Called after each trial with its number, values and accuracy in percent. The accuracy is None if the
            loss diverged.

    Returns:
        None if other processes are still running trials. The last of them carries out the final run.

    Raises:
        RunError: Optuna is missing, the search is invalid, the folder holds another search, or every trial failed.
        RefilledError: The run cannot work as configured.
    """
    if trials < 1:
        raise RunError(f"the number of trials must be at least 1, but is {trials}")
    run = resolve(replace(run, score="val"))
    distributions = {name: _distribution(run, name, text) for name, text in search.items()}
    if not distributions:
        raise RunError("name at least one parameter to search, as in kd_weight=1..100:log")
    _begin(run, search, folder)
    study = _open(folder)
    while True:
        with ExitStack() as claims:
            trial = _next(study, distributions, trials, run.seed, folder, claims)
            if trial is None:
                break
            accuracy = _try(study, trial, run, folder / "trials" / str(trial.number))
            _tell(study, trial, accuracy)
            on_trial(trial.number, trial.params, accuracy)
    return _finish(study, run, folder)


def _distribution(run: Run, name: str, text: str) -> "BaseDistribution":
    searchable = {**_recipe_types(), **load_method(run.method).types}
    if name not in searchable:
        raise RunError(unknown("parameter to search", name, searchable))
    distribution, texts = parse_values(name, searchable[name], text)
    for value in texts:
        resolve(_with(run, {name: value}))
    return distribution


def _recipe_types() -> dict[str, Any]:
    hints = get_type_hints(Recipe)
    return {field.name: hints[field.name] for field in fields(Recipe) if field.name != "seed"}  # do not tune luck


def _with(run: Run, values: Mapping[str, Any]) -> Run:
    """Set values, possibly text, in a run. The method's parameters take precedence over fields of the same name."""
    own = load_method(run.method).parameters
    settings = {name: value for name, value in values.items() if name in own}
    types = _recipe_types()
    try:
        recipe = {
            name: TypeAdapter(types[name]).validate_python(value) for name, value in values.items() if name not in own
        }
    except ValidationError as error:
        raise RunError(f"{error.errors()[0]['input']!r} cannot be tried: {error.errors()[0]['msg']}") from None
    return replace(run, settings={**run.settings, **settings}, **recipe)


def _begin(run: Run, search: Mapping[str, str], folder: Path) -> None:
    """Record the run and the search, or check that the folder holds the same ones."""
    path = folder / "tuning.toml"
    wanted = {"search": dict(search), "run": tomllib.loads(run.to_toml())}
    if not path.exists():
        check(run)  # before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        if not path.exists():
            if any(entry.name != ".lock" for entry in folder.iterdir()):
                raise RunError(f"{folder} is not empty and holds no tuning; choose another --out")
            write_atomic(path, tomli_w.dumps(wanted).encode())
        elif read_toml(path) != wanted:
            raise RunError(
                f"{folder} holds a tuning of another run or search; see {path.name}, or choose another --out"
            )


def _open(folder: Path) -> "Study":
    return open_study(folder / "journal.log", "refilled")


def _next(
    study: "Study",
    distributions: Mapping[str, "BaseDistribution"],
    trials: int,
    seed: int,
    folder: Path,
    claims: ExitStack,
) -> "FrozenTrial | None":
    """Resume an abandoned trial, or start a new one. The trial is locked until ``claims`` is closed."""
    optuna = import_optuna()
    with alone(folder):  # one process at a time, so that each sees which trials are taken
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            if _claim(folder, str(trial.number), claims):
                return trial
        number = len(study.trials)
        if number >= trials:
            return None
        # Seeded by the trial, not the process, so that an interrupted search continues as if never interrupted.
        study.sampler = optuna.samplers.TPESampler(seed=(seed * _MANY + number) % 2**32)
        asked = study.ask(dict(distributions))
        _claim(folder, str(asked.number), claims)
        return study.trials[asked.number]


def _claim(folder: Path, name: str, claims: ExitStack) -> bool:
    """Lock something for this process; return False if another process holds the lock."""
    claim = folder / ".claims" / name
    claim.mkdir(parents=True, exist_ok=True)
    try:
        claims.enter_context(hold(claim))
    except RunError:
        return False
    return True


def _try(study: "Study", trial: "FrozenTrial", run: Run, folder: Path) -> float | None:
    """Return a trial's accuracy on the held-out images in percent, or None if its loss diverged."""
    for other in study.get_trials(deepcopy=False):
        if other.params == trial.params and other.value is not None:
            return other.value  # the same run gives the same result
    try:
        return complete(_with(run, trial.params), folder).accuracy
    except NonFiniteError:
        return None


def _tell(study: "Study", trial: "FrozenTrial", accuracy: float | None) -> None:
    if accuracy is None:
        study.tell(trial.number, state=import_optuna().trial.TrialState.FAIL)
    else:
        study.tell(trial.number, accuracy)


def _finish(study: "Study", run: Run, folder: Path) -> Tuned | None:
    states = import_optuna().trial.TrialState
    with ExitStack() as claims:
        if study.get_trials(states=(states.RUNNING,)) or not _claim(folder, "best", claims):
            return None
        if not study.get_trials(states=(states.COMPLETE,)):
            trials = count_of(len(study.trials), "trial")
            raise RunError(f"the loss diverged in each of {trials}; search lower rates or weights")
        best = study.best_trial
        final = replace(_with(run, best.params), val=0.0, score="test")
        assert best.value is not None  # it is complete
        final_folder = folder / "best" / str(best.number)
        return Tuned(best.params, best.value, complete(final, final_folder), final_folder)
