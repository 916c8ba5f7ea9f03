"""Choose hyper-parameters of a few-shot method on tasks of the validation classes, never on the unseen classes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from refilled.config import FewShotRun
from refilled.data import queries_left
from refilled.errors import RunError, unknown
from refilled.fewshot.evaluation import load_side, make_bank, resolve, task_accuracies
from refilled.fewshot.methods import FewShotMethod, load_few_shot_method
from refilled.runs.determinism import use_machine
from refilled.tuning.search_space import import_optuna, parse_values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial


def tune(
    run: FewShotRun,
    search: Mapping[str, str],
    *,
    trials: int,
    n_episodes: int,
    storage: Path,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Search with Optuna for the settings with the best mean accuracy on tasks of the validation classes.

    The search is kept in ``storage``. An interrupted search resumes when it is started again.

    Args:
        run: The test to tune for. Its tasks are drawn from the validation classes instead.
        search: By parameter of the method, the values to try; see :mod:`refilled.tuning.search_space`.
        trials: Number of settings to try, including those of earlier starts.
        n_episodes: Number of tasks per trial.
        storage: The file that keeps the search.
        progress: Called with a line of text after each trial.

    Returns:
        The run's settings, updated with the best values found.

    Raises:
        RunError: Optuna is not installed, or the search is invalid.
    """
    optuna = import_optuna()
    method = load_few_shot_method(run.method)
    distributions = {name: _distribution(method, name, text) for name, text in search.items()}
    run = resolve(replace(run, side="val", n_episodes=n_episodes))
    use_machine(run.threads, run.device)
    pool = load_side(run)
    bank = make_bank(run, pool)  # shared by all trials, so that each image is embedded once
    run = replace(run, n_query=queries_left(pool.train.labels, run.n_shot, run.n_query, pool.classes))

    def accuracy(trial: "Trial") -> float:
        learner = method.learner(bank, {**run.settings, **trial.params})
        accuracies: list[float] = []
        for first in range(0, n_episodes, run.batch):
            numbers = range(first, min(first + run.batch, n_episodes))
            accuracies += task_accuracies(learner, pool.train.labels, numbers, run)
        progress(f"trial {trial.number + 1}: {mean(accuracies):.2f} %  {trial.params}")
        return mean(accuracies)

    storage.parent.mkdir(parents=True, exist_ok=True)
    journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    study = optuna.create_study(
        storage=journal,
        study_name=run.method,
        direction="maximize",
        load_if_exists=True,
    )
    complete = (optuna.trial.TrialState.COMPLETE,)
    while (finished := len(study.get_trials(states=complete))) < trials:
        # Seeded by the number of the trial, so that an interrupted search continues as if it had not been interrupted.
        study.sampler = optuna.samplers.TPESampler(seed=run.seed + finished)
        trial = study.ask(distributions)
        study.tell(trial, accuracy(trial))
    return method.settle({**run.settings, **study.best_params})


def _distribution(method: FewShotMethod, name: str, text: str) -> "BaseDistribution":
    if name not in method.parameters:
        raise RunError(f"--tune {name}: {unknown('parameter', name, method.parameters)}")
    return parse_values(name, method.types[name], text)[0]
