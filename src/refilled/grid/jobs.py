"""The jobs of a grid: training runs, meta-training runs and few-shot tests, each with its own folder.

The name of a folder contains a digest of the configuration, which includes the names of the folders that the job reads.
A backbone is therefore trained once, equal cells of several tables share a job, and a changed setting is a new job.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from refilled.config import WHERE, FewShotRun, MetaRun, Run, what
from refilled.fewshot.evaluation import FewShotResult, evaluate_few_shot
from refilled.fewshot.meta_training import MetaResult, meta_train
from refilled.fewshot.methods import load_few_shot_method, load_meta_learner
from refilled.methods import load_method
from refilled.runs.experiment import After, complete
from refilled.runs.result import Result
from refilled.training.checkpoints import hold
from refilled.tuning.few_shot import tune


@dataclass(frozen=True)
class FewShotTest:
    """A few-shot test, preceded by the choice of hyper-parameters on the validation classes.

    Attributes:
        run: The test without its models, which are given here.
        search: Values to try by parameter of the method; see :mod:`refilled.tuning.search_space`. All other settings
            are those of ``run``.
        trials: Number of settings to try.
        tune_tasks: Number of tasks of the validation classes per setting.
        teacher: Folder of the frozen model.
        student: Folder of the model from which the student of each task starts; None if the method trains none.
    """

    run: FewShotRun
    search: Mapping[str, str] = field(default_factory=dict)
    trials: int = 0
    tune_tasks: int = 0
    teacher: str | None = None
    student: str | None = None

    @property
    def filled(self) -> FewShotRun:
        """The test with its models."""
        start = {} if self.student is None else {"student": self.student}
        return replace(self.run, teacher=self.teacher, settings={**self.run.settings, **start})


Job = Run | MetaRun | FewShotTest
JobResult = Result | MetaResult | FewShotResult


def carry_out(job: Job, folder: Path, after: After | None = None) -> JobResult:
    """Start or resume a job and return its result; a finished job is not repeated.

    Args:
        job: The job.
        folder: Its folder.
        after: Called with a training run that has just finished.

    Raises:
        InUseError: Another process holds the lock of the folder.
        RefilledError: The job has a fault.
    """
    match job:
        case Run():
            return complete(job, folder, after=after)
        case MetaRun():
            return meta_train(job, folder)
        case FewShotTest():
            return _test(job, folder)


def load(job: Job, folder: Path) -> JobResult:
    """Return the result of a finished job."""
    match job:
        case Run():
            return Result.load(folder)
        case MetaRun():
            return MetaResult.load(folder)
        case FewShotTest():
            return FewShotResult.load(folder)


def accuracy(result: JobResult) -> float:
    """Return the accuracy of a job in percent. For meta-training, it is that on the validation classes."""
    return result.val_accuracy if isinstance(result, MetaResult) else result.accuracy


def name_of(job: Job) -> str:
    """Return a job's name, with a digest of all settings that affect its result but not of where it runs.

    Raises:
        MethodError: The method or one of its parameters is unknown.
    """
    match job:
        case Run():
            decisive = _decisive(job)
            return f"{(job.student or 'teacher').replace('/', '_')}-{_method_and_seed(job)}-{_digest(decisive)}"
        case MetaRun():
            in_full = replace(job, settings=load_meta_learner(job.method).settle(job.settings))
            return f"meta-{job.n_shot}shot-{_method_and_seed(job)}-{_digest(what(asdict(in_full)))}"
        case FewShotTest():
            run = replace(job.run, settings=load_few_shot_method(job.run.method).settle(job.run.settings))
            about_the_search = {name: value for name, value in vars(job).items() if name != "run"}
            return f"{run.n_shot}shot-{_method_and_seed(run)}-{_digest({**what(asdict(run)), **about_the_search})}"


def _decisive(run: Run) -> dict[str, Any]:
    """Return the settings that are not defaults, so that parameters added later do not rename earlier runs."""
    method = load_method(run.method)
    settings = method.settle(run.settings)
    unusual = {key: value for key, value in settings.items() if value != method.parameters[key]}
    named = [f for f in fields(run) if f.name not in (*WHERE, "settings") and getattr(run, f.name) != f.default]
    return {f.name: getattr(run, f.name) for f in named} | {"settings": unusual}


def _method_and_seed(run: Run | MetaRun | FewShotRun) -> str:
    return f"{Path(run.method).stem}-s{run.seed}"


def _digest(decisive: Mapping[str, Any]) -> str:
    return sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def _test(job: FewShotTest, folder: Path) -> FewShotResult:
    if not job.search:
        return evaluate_few_shot(job.filled, folder)
    search = folder.with_name(f"{folder.name}.tuning")
    search.mkdir(parents=True, exist_ok=True)
    with hold(search):  # only one process searches; two could test different choices
        settings = tune(
            job.filled,
            job.search,
            trials=job.trials,
            n_episodes=job.tune_tasks,
            storage=search / "trials",
            progress=lambda text: None,
        )
        return evaluate_few_shot(replace(job.filled, settings=settings), folder)
