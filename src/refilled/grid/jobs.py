"""What tables are filled from: trainings, meta-trainings and few-shot tests, each in a folder of its own.

A folder is named after a digest of the configuration, with the names of the folders that it reads. So backbones are
trained once, equal cells of several tables are one job, and a changed setting is another job instead of a wrong one.
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
from refilled.runs.experiment import complete
from refilled.runs.result import Result
from refilled.training.checkpoints import hold
from refilled.tuning.few_shot import tune


@dataclass(frozen=True)
class FewShotTest:
    """A few-shot test, and the choice of hyper-parameters on the validation classes that comes before it.

    Attributes:
        run: The test; which models it takes is said here.
        search: What to try for parameters of the method, as :func:`~refilled.tuning.few_shot.tune` reads it; all other
            settings are those of ``run``.
        trials: Settings to try.
        tune_tasks: Tasks of the validation classes to try each on.
        teacher: Folder of the frozen model.
        student: Folder of the model from which the student of each task starts; None where the method trains none.
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
Found = Result | MetaResult | FewShotResult


def carry_out(job: Job, folder: Path) -> Found:
    """Begin a job, or go on with it where it stands; a finished one gives its result.

    Raises:
        InUseError: another process is at it.
        RefilledError: anything in the job that cannot work.
    """
    match job:
        case Run():
            return complete(job, folder)
        case MetaRun():
            return meta_train(job, folder)
        case FewShotTest():
            return _test(job, folder)


def load(job: Job, folder: Path) -> Found:
    """Read the result of a finished job."""
    match job:
        case Run():
            return Result.load(folder)
        case MetaRun():
            return MetaResult.load(folder)
        case FewShotTest():
            return FewShotResult.load(folder)


def accuracy(found: Found) -> float:
    """What a job reached, in percent; in meta-training, on the validation classes."""
    return found.val_accuracy if isinstance(found, MetaResult) else found.accuracy


def name_of(job: Job) -> str:
    """Name a job after what it is, with a digest of all that decides its outcome; not of where it takes place.

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
    """Leave defaults out, so that a parameter that is added later does not rename the runs before it."""
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
    with hold(search):  # one process chooses, or two would test different choices
        settings = tune(
            job.filled,
            job.search,
            trials=job.trials,
            n_episodes=job.tune_tasks,
            storage=search / "trials",
            progress=lambda text: None,
        )
        return evaluate_few_shot(replace(job.filled, settings=settings), folder)
