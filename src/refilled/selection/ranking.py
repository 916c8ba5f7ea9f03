"""Candidate teachers, measured on a sample of the training images and ranked."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from refilled.config import Run
from refilled.data import Task
from refilled.errors import ModelError, RunError
from refilled.losses.trust import label_information
from refilled.models import Backbone
from refilled.runs.determinism import use_machine
from refilled.runs.examination import fault_in, pixels_of
from refilled.runs.prepared import examine, load_task_of, load_teacher_of, resolve
from refilled.selection.forecast import Features, load_forecast
from refilled.selection.measures import (
    Accuracy,
    folds_of,
    held_out_accuracy,
    linear_probe,
    logme,
    nearest_class_mean,
    smallest_within_one_error,
)
from refilled.selection.sample import SAMPLE, Cost, cost_of, embedding_of, sample_of

Say = Callable[[str], None]

_WORTH_A_TRIAL = 1.0  # percentage points; a smaller gain was never established over three seeds


@dataclass(frozen=True)
class Measured:
    """The measurements of a candidate at one size.

    Attributes:
        candidate: Name of the teacher, in a form of ``--teacher``.
        size: Side length in pixels of its input; None if it is not known.
        fault: Reason why it cannot help, as far as it is known before training; None if there is none.
        unusable: Whether training would refuse it. In this case, nothing else is measured.
        notes: Warnings of the check before training.
        label_information: Share of the labels' entropy that its nearest class means remove.
        nearest_class_mean: Accuracy of its nearest class means on held-out folds.
        linear_probe: Accuracy of logistic regression on held-out folds.
        logme: See :func:`~refilled.selection.measures.logme`.
        cost: The cost of an image.
        gain: Forecast gain in percentage points of a student with ``--preset good``; 0 if there is a fault, because the
            preset then ignores the teacher.
        extrapolated: Whether there are fewer or more labels per class than the forecast was fitted to.
    """

    candidate: str
    size: int | None = None
    fault: str | None = None
    unusable: bool = False
    notes: tuple[str, ...] = ()
    label_information: float | None = None
    nearest_class_mean: Accuracy | None = None
    linear_probe: Accuracy | None = None
    logme: float | None = None
    cost: Cost | None = None
    gain: float | None = None
    extrapolated: bool = False


@dataclass(frozen=True)
class Ranking:
    """Candidates, the best first, and the sample on which they were measured.

    Attributes:
        task: Name of the task.
        classes: Number of classes of the sample.
        images: Number of images of the sample.
        labels_per_class: Mean number of training images per class, in the whole task.
        pixels: Accuracy of the nearest class means of the pixels on held-out folds.
        candidates: The candidates at each size.
        sizes: For each candidate that was measured at several sizes, the smallest size whose linear probe is within
            one standard error of its best.
        error: Root mean square error of the forecast in percentage points, on data sets that it was not fitted to.
    """

    task: str
    classes: int
    images: int
    labels_per_class: float
    pixels: Accuracy
    candidates: tuple[Measured, ...]
    sizes: dict[str, int]
    error: float

    @property
    def helpful(self) -> list[Measured]:
        """The candidates with a forecast gain of 1 point or more."""
        return [one for one in self.candidates if one.fault is None and (one.gain or 0) >= _WORTH_A_TRIAL]

    @property
    def verdict(self) -> str:
        """The recommendation, as text."""
        if not self.helpful:
            return "no teacher has a forecast gain of 1 point or more"
        best = self.helpful[0]
        size = self.sizes.get(best.candidate)
        where = "" if size is None else f" at {size} pixels"
        doubt = "" if (best.gain or 0) > self.error else ", which is less than the error of the forecast"
        return f"{best.candidate}{where}: forecast gain {best.gain:+.1f} ± {self.error:.1f} points{doubt}"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-compatible data."""
        return {**asdict(self), "verdict": self.verdict}


class Bench:
    """A sample of a task's images on which teachers are measured.

    Args:
        run: The run. Only its task, seed, teacher settings and machine settings are used.
        images: Maximum number of images of the sample.
        task: The task, if it is loaded already.

    Raises:
        RefilledError: The task cannot be loaded, or has too few images.
    """

    def __init__(self, run: Run, images: int = SAMPLE, task: Task | None = None) -> None:
        self.run = resolve(replace(run, precision="32-true", method="vanilla", settings={}))
        use_machine(self.run.threads, self.run.device)
        task = load_task_of(self.run) if task is None else task
        self.task = sample_of(task, images, self.run.seed)
        self.labels = self.task.train.labels
        self.classes = self.labels.unique().numel()
        self.labels_per_class = len(task.train) / task.train.labels.unique().numel()
        self.folds = folds_of(self.task.train, self.run.seed)
        self._pixels = pixels_of(self.task.train)
        self.pixels = self.accuracy(self._pixels)

    def accuracy(self, embedding: Tensor) -> Accuracy:
        """Return the accuracy of the nearest class means on held-out folds."""
        return held_out_accuracy(nearest_class_mean, embedding, self.labels, self.folds)

    def probe(self, embedding: Tensor) -> Accuracy:
        """Return the accuracy of the linear probe on held-out folds."""
        return held_out_accuracy(linear_probe, embedding, self.labels, self.folds)

    def load(self, candidate: str, size: int | None) -> Backbone:
        """Load a candidate. The message of an error names it."""
        try:
            return load_teacher_of(self._run_of(candidate, size), self.task.image_size)
        except ModelError as error:
            raise ModelError(f"candidate {candidate}: {error}") from error

    def embed(self, teacher: Backbone, candidate: str, size: int | None) -> Tensor:
        """Embed the sample ``(N, d)``."""
        return embedding_of(teacher, self.task, self._run_of(candidate, size))

    def measure(self, teacher: Backbone, candidate: str, size: int | None) -> Measured:
        """Measure a candidate. One that training would refuse is unusable."""
        try:
            notes = examine(teacher, self.task.train, candidate)
            embedding = self.embed(teacher, candidate, size)
        except ModelError as error:
            return Measured(candidate, size, fault=str(error), unusable=True)
        found = self.accuracy(embedding)
        fault = fault_in(embedding, self._pixels, self.labels)
        features = Features.of(found.percent, self.pixels.percent, self.labels_per_class)
        model, cost = load_forecast(), cost_of(teacher, self.task, self.run.device)
        return Measured(
            candidate,
            cost.size,
            fault=fault and f"it tells your classes apart {fault}",
            notes=notes,
            label_information=label_information(embedding, self.labels),
            nearest_class_mean=found,
            linear_probe=self.probe(embedding),
            logme=logme(embedding, self.labels),
            cost=cost,
            gain=0.0 if fault else model.gain(features),
            extrapolated=model.extrapolates(features),
        )

    def _run_of(self, candidate: str, size: int | None) -> Run:
        return replace(self.run, teacher=candidate, teacher_size=self.run.teacher_size if size is None else size)


def rank_teachers(
    run: Run,
    candidates: Sequence[str],
    sizes: Sequence[int] = (),
    images: int = SAMPLE,
    say: Say = lambda text: None,
) -> Ranking:
    """Measure candidate teachers on a sample of a task's training images, and rank them.

    Candidates are ordered by the forecast gain, then by the label information. Those that training would refuse, or
    that separate the classes no better than chance or the pixels, come last.

    Args:
        run: The run. Only its task, shots, seed, teacher settings and machine settings are used.
        candidates: Names of teachers, in the forms of ``--teacher``.
        sizes: Side lengths in pixels at which each candidate is measured. Empty: each at its own size.
        images: Maximum number of images of the sample.
        say: Called with a line before each candidate.

    Raises:
        RefilledError: A candidate does not exist or takes none of these sizes, or the task has too few images.
    """
    if len(set(candidates)) < len(candidates):
        raise RunError("a candidate is given twice; give each once")
    bench = Bench(run, images)
    wanted = [(candidate, size) for candidate in candidates for size in (sizes or (None,))]
    for candidate, size in wanted:
        bench.load(candidate, size)  # errors appear now, and not after an hour of embedding
    measured = []
    for candidate, size in wanted:
        say(f"{candidate}{'' if size is None else f' at {size} pixels'}: {len(bench.labels)} images")
        measured.append(bench.measure(bench.load(candidate, size), candidate, size))
    best_first = sorted(measured, key=_order)
    return Ranking(
        task=bench.task.name,
        classes=bench.classes,
        images=len(bench.labels),
        labels_per_class=bench.labels_per_class,
        pixels=bench.pixels,
        candidates=tuple(best_first),
        sizes=_settled(measured) if len(sizes) > 1 else {},
        error=load_forecast().error,
    )


def settle_size(run: Run, sizes: Sequence[int] = (), images: int = 1000) -> tuple[int, str]:
    """Choose the input size of a run's teacher by its linear probe: the smallest within one standard error of the best.

    Args:
        run: The run, with a teacher.
        sizes: Side lengths in pixels to measure. Empty: 1, 1.5, 2 and 3 times the size of the images, and the teacher's
            own size, up to 224 pixels.
        images: Maximum number of images of the sample.

    Returns:
        The size, and a line about the measurement.

    Raises:
        RunError: The run has no teacher.
        ModelError: The teacher takes only one size, or training would refuse it.
    """
    name = run.only_teacher
    if name is None:
        raise RunError("--teacher-size auto measures the teacher; name one with --teacher")
    bench = Bench(replace(run, teacher_size=None), images)
    teacher = bench.load(name, None)
    examine(teacher, bench.task.train, name)
    if teacher.required_size is not None:
        raise ModelError(f"the teacher takes images of {teacher.required_size} pixels only; leave out --teacher-size")
    chosen = sizes or _sizes_for(bench.task.image_size, teacher)
    found = []
    for size in chosen:
        teacher = bench.load(name, size)
        found.append(bench.probe(bench.embed(teacher, name, size)))
    best = smallest_within_one_error(chosen, found)
    accuracies = ", ".join(f"{size}: {one.percent:.1f} %" for size, one in zip(chosen, found, strict=True))
    return best, f"teacher size {best} pixels, by the linear probe on {len(bench.labels)} images ({accuracies})"


def _sizes_for(image_size: int, teacher: Backbone) -> list[int]:
    step, own = teacher.size_step or 1, teacher.input_size or image_size
    most = max(224, image_size)
    wanted = {min(round(factor * image_size), most) for factor in (1, 1.5, 2, 3)} | {min(own, most)}
    return sorted({max(1, round(size / step)) * step for size in wanted})


def _order(one: Measured) -> tuple[bool, bool, float, float]:
    return one.unusable, one.fault is not None, -(one.gain or 0.0), -(one.label_information or 0.0)


def _settled(measured: Sequence[Measured]) -> dict[str, int]:
    """Return the best size of each candidate that could be measured."""
    by_candidate: dict[str, dict[int, Accuracy]] = {}
    for one in measured:
        if one.size is not None and one.linear_probe is not None:
            by_candidate.setdefault(one.candidate, {})[one.size] = one.linear_probe
    return {name: smallest_within_one_error(list(found), list(found.values())) for name, found in by_candidate.items()}
