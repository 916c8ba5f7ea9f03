"""Doubtful labels and near copies among the images of a task."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refilled.config import WHERE, Run
from refilled.data import Split, Task
from refilled.data.several import Several
from refilled.data.task import fingerprint
from refilled.errors import RunError
from refilled.losses.distances import unit_rows
from refilled.runs.determinism import use_machine
from refilled.runs.examination import Verdict
from refilled.runs.folder import RunFolder
from refilled.runs.inference import network_of
from refilled.runs.prepared import examine, load_task_of, load_teacher_of, resolve, runs_code
from refilled.runs.scoring import finite_embedding
from refilled.selection.measures import deal_folds
from refilled.selection.near_copies import Copies, near_copies
from refilled.selection.sample import embedding_of
from refilled.words import flag_of

Say = Callable[[str], None]

_FEWEST = 3  # different images per class; the classifier learns from one or two of them
_INVERSE_STRENGTH = 10.0
_POOR = 50.0  # percent
_OF_A_RUN = ("task", *WHERE, "teacher", "teacher_mean", "teacher_std", "teacher_size", "teacher_embedding")


@dataclass(frozen=True)
class Place:
    """The position of an image in a task.

    Attributes:
        image: Its path within the folder, or another name.
        part: ``train``, ``val`` or ``test``.
        row: Its position in the part.
        label: Its class.
    """

    image: str
    part: str
    row: int
    label: str


@dataclass(frozen=True)
class Doubt:
    """A label that is probably wrong.

    Attributes:
        place: The image and its given label.
        suggested: The most probable class.
        score: Probability of the given label, by a classifier that was trained without this image and its copies.
        suggested_probability: Probability of the suggested class, by the same classifier.
    """

    place: Place
    suggested: str
    score: float
    suggested_probability: float


@dataclass(frozen=True)
class CopyGroup:
    """Images that are near copies of one another.

    Attributes:
        places: The images, two or more.
        correlation: The lowest correlation by which two of them were joined.
    """

    places: tuple[Place, ...]
    correlation: float

    @property
    def across(self) -> bool:
        """Whether they are in different parts, so that a score includes images that were trained on."""
        return len({place.part for place in self.places}) > 1

    @property
    def disagree(self) -> bool:
        """Whether their labels differ."""
        return len({place.label for place in self.places}) > 1

    @property
    def marks(self) -> tuple[str, ...]:
        """Properties of the group, as short texts."""
        equal = "equal pixels" if self.correlation == 1 else f"correlation {self.correlation:.3f}"
        return (*(["across parts"] if self.across else []), *(["labels differ"] if self.disagree else []), equal)


@dataclass(frozen=True)
class Findings:
    """Doubtful labels and near copies among the images of a task.

    Attributes:
        task: The task, whose images the page shows.
        network: Name of the network that embedded the images.
        judged: Number of images whose labels were judged.
        agreement: Percentage of them whose most probable class is the given label; None if none were judged.
        doubts: The doubtful labels, the most doubtful first.
        groups: Groups of near copies; first those across parts, then those whose labels differ.
        limit: Minimum correlation of two copies.
        notes: Notes for the reader.
    """

    task: Task
    network: str
    judged: int
    agreement: float | None
    doubts: tuple[Doubt, ...]
    groups: tuple[CopyGroup, ...]
    limit: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-compatible data, without the images."""
        return {
            "task": self.task.name,
            "network": self.network,
            "judged": self.judged,
            "agreement": self.agreement,
            "doubts": [asdict(doubt) for doubt in self.doubts],
            "groups": [{**asdict(group), "across": group.across, "disagree": group.disagree} for group in self.groups],
            "limit": self.limit,
            "notes": list(self.notes),
        }


def find_doubtful(
    run: Run, with_test: bool = False, say: Say = lambda text: None, folder: Path | None = None
) -> Findings:
    """Find doubtful labels of training images, and near copies among the images of all parts.

    The images are embedded by the run's teacher; without one, by the student in ``folder``. Logistic regression on the
    embedding, trained on the other folds, gives the class probabilities of each image. Near copies share a fold.
    cleanlab estimates how many labels are wrong. The labels with the lowest probabilities are returned.

    References:
        Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels, JAIR 2021.

    Args:
        run: The run. Only its task, teacher, seed and machine settings are used.
        with_test: Also judge the labels of the test images.
        say: Called with a line before each step.
        folder: The folder of a finished run, whose student embeds the images if the run has no teacher.

    Raises:
        RunError: cleanlab is not installed, or there is no teacher.
        RefilledError: The task cannot be loaded, or the teacher cannot be used.
    """
    find_issues = _cleanlab()
    run = resolve(replace(run, precision="32-true", method="vanilla", settings={}, unlabelled=None))
    use_machine(run.threads, run.device)
    if run.teacher is None and folder is None:
        raise RunError("there is no network to embed the images; give one, for example --teacher timm/resnet50")
    task = load_task_of(run)
    parts = {name: part for name, part in (("train", task.train), ("val", task.val), ("test", task.test)) if len(part)}
    embedding, network, notes = _embedding(run, task, parts, folder, say)
    say("comparing images")
    copies = near_copies(embedding, list(parts.values()))
    places = [
        Place(source, name, row, task.classes[label])
        for name, part in parts.items()
        for row, (source, label) in enumerate(zip(part.sources, part.labels.tolist(), strict=True))
    ]
    labels = torch.cat([part.labels for part in parts.values()])
    wanted = torch.tensor([with_test or place.part != "test" for place in places])
    rows, few = _enough(labels, copies, wanted)
    if few:
        notes.append(
            f"not judged, with fewer than {_FEWEST} different images: {Several.of(task.classes[n] for n in few)}"
        )
    doubts: list[Doubt] = []
    agreement = None
    classes = labels[rows].unique()
    if len(classes) > 1:
        say(f"training on folds of {len(rows)} images")
        given = torch.searchsorted(classes, labels[rows])
        probabilities = held_out_probabilities(embedding[rows], given, copies.groups[rows.numpy()], run.seed)
        names = [task.classes[number] for number in classes.tolist()]
        doubts, agreement = _doubts(find_issues, probabilities, given, [places[row] for row in rows.tolist()], names)
        if agreement < _POOR:
            notes.append(
                f"the classifier predicts only {agreement:.0f} % of the given labels; expect many false alarms"
            )
    else:
        notes.append("no labels were judged: fewer than two classes have enough images")
    return Findings(
        task=task,
        network=network,
        judged=len(rows) if agreement is not None else 0,
        agreement=agreement,
        doubts=tuple(doubts),
        groups=tuple(_groups(copies, places)),
        limit=copies.limit,
        notes=(*task.notes, *notes),
    )


def run_in(folder: Path, changes: dict[str, Any]) -> Run:
    """Return the run in a folder, with changes of its machine settings or its teacher.

    A recorded teacher is left out if the run ignored it.

    Raises:
        RunError: Another field is changed, or the run names a Python file, which would be executed.
    """
    others = sorted(set(changes) - set(_OF_A_RUN))
    if others:
        flags = ", ".join(map(flag_of, others))
        raise RunError(f"{folder} contains a run, which determines {flags}; leave it out, or give the folder of images")
    run = RunFolder(folder).run()
    if "teacher" in changes:
        recorded = {name: None for name in _OF_A_RUN if name.startswith("teacher_")}
        return replace(run, **{**recorded, **changes})
    if run.teacher is not None and runs_code(run.teacher):
        raise RunError(
            f"the run in {folder} names a Python file, which would be executed. If you trust it, name it yourself: "
            f"--teacher {run.teachers[0]}"
        )
    verdict = Verdict.load(folder)
    if verdict is not None and verdict.ignored:
        changes = {**changes, "teacher": None}
    return replace(run, **changes)


def held_out_probabilities(
    embedding: Tensor, labels: Tensor, groups: NDArray[np.int64], seed: int = 0
) -> NDArray[np.float64]:
    """Return each image's probabilities of the classes by logistic regression on the other folds.

    The embedding is centred and L2-normalised. Images of a group share a fold. A class without images in the other
    folds has probability 0.

    Args:
        embedding: ``(N, d)``.
        labels: Class ids ``(N,)``, 0 .. C-1, each present.
        groups: Number of the group of each image ``(N,)``.
        seed: Seed of the folds.

    Returns:
        ``(N, C)``.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    folds = deal_folds(labels, groups, seed).numpy()
    points, ids = unit_rows(embedding - embedding.mean(0)).double().numpy(), labels.numpy()
    probabilities = np.zeros((len(ids), int(ids.max()) + 1))
    for fold in np.unique(folds):
        rest, here = folds != fold, folds == fold
        present = np.unique(ids[rest])
        if len(present) == 1:
            probabilities[here, present[0]] = 1.0
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the order of the images converges much earlier
            classifier = LogisticRegression(C=_INVERSE_STRENGTH, max_iter=1000).fit(points[rest], ids[rest])
        probabilities[np.ix_(here, classifier.classes_)] = classifier.predict_proba(points[here])
    return probabilities


def _cleanlab() -> Callable[..., NDArray[np.int64]]:
    try:
        from cleanlab.filter import find_label_issues
    except ImportError:
        raise RunError("judging labels needs cleanlab: pip install 'refilled[clean]'") from None
    found: Callable[..., NDArray[np.int64]] = find_label_issues
    return found


def _embedding(
    run: Run, task: Task, parts: dict[str, Split], folder: Path | None, say: Say
) -> tuple[Tensor, str, list[str]]:
    """Return the embedding of all parts ``(N, d)``, the network's name, and notes."""
    count = sum(map(len, parts.values()))
    name = run.only_teacher
    if name is not None:
        teacher = load_teacher_of(run, task.image_size)
        notes = list(examine(teacher, task.train, name))
        say(f"embedding {count} images with {name}")
        found = [
            embedding_of(teacher, replace(task, train=part, fingerprint=fingerprint(task.classes, (part,))), run)
            for part in parts.values()
        ]
        return torch.cat(found), name, notes
    assert folder is not None  # find_doubtful has checked it
    if not RunFolder(folder).finished:
        raise RunError(f"the run in {folder} is unfinished and has no teacher to use; finish it, or give --teacher")
    student = network_of(folder)
    say(f"embedding {count} images with the student in {folder}")
    note = (
        "the student was trained on these labels, so it may repeat wrong ones; a network that was not, given with "
        "--teacher, finds more"
    )
    embedded = torch.cat([finite_embedding(student, part, run.device) for part in parts.values()])
    return embedded, f"the student in {folder}", [note]


def _enough(labels: Tensor, copies: Copies, wanted: Tensor) -> tuple[Tensor, list[int]]:
    """Return the rows of the classes that can be judged, and the other classes."""
    few = []
    for number in labels[wanted].unique().tolist():
        if len(np.unique(copies.groups[(wanted & (labels == number)).numpy()])) < _FEWEST:
            few.append(number)
    judged = wanted & ~torch.isin(labels, torch.tensor(few, dtype=labels.dtype))
    return judged.nonzero().flatten(), few


def _doubts(
    find_issues: Callable[..., NDArray[np.int64]],
    probabilities: NDArray[np.float64],
    labels: Tensor,
    places: Sequence[Place],
    names: Sequence[str],
) -> tuple[list[Doubt], float]:
    """Return the doubtful labels, the most doubtful first, and the percentage of labels that are predicted."""
    given, best = labels.numpy(), probabilities.argmax(1)
    rows = find_issues(
        given,
        probabilities,
        return_indices_ranked_by="self_confidence",
        filter_by="low_self_confidence",  # with many classes, far more precise than cleanlab's default
        n_jobs=1,
    )
    doubts = [
        Doubt(
            places[row], names[best[row]], float(probabilities[row, given[row]]), float(probabilities[row, best[row]])
        )
        for row in rows.tolist()
        if best[row] != given[row]
    ]
    return doubts, 100 * float((best == given).mean())


def _groups(copies: Copies, places: Sequence[Place]) -> list[CopyGroup]:
    rows: dict[int, list[Place]] = {number: [] for number in copies.correlation}
    for number, place in zip(copies.groups.tolist(), places, strict=True):
        if number in rows:
            rows[number].append(place)
    found = [CopyGroup(tuple(members), copies.correlation[number]) for number, members in rows.items()]
    return sorted(found, key=lambda group: (not group.across, not group.disagree, -group.correlation))
