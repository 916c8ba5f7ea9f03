"""The page of a run: one HTML file without scripts and without external resources."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from refilled.data import Task
from refilled.data.several import Several
from refilled.errors import RunError
from refilled.files import read_json_lines, write_atomic
from refilled.models import Backbone
from refilled.report.card import model_card
from refilled.report.command import command_of, how_to_know
from refilled.report.matrix import matrix_of
from refilled.report.measures import Reliability, confusion_matrix, most_confused, reliability, top_accuracy
from refilled.report.pictures import COLORS, address, plain_text, svg
from refilled.report.projection import IMAGES, networks_of, projection_of
from refilled.report.speed import speed_of
from refilled.report.teachers import teacher_rows
from refilled.report.text import visible
from refilled.runs.folder import RunFolder
from refilled.runs.inference import network_of, readout_classes, task_of
from refilled.runs.prepared import Prepared
from refilled.runs.result import Result
from refilled.training.evaluation import predict
from refilled.words import count_of, printable

_WORST = 16  # images
_MANY = 20  # classes
_PAIRS, _PAIRS_OF_MANY = 12, 30
_TOP5_ABOVE = 10  # classes


@dataclass(frozen=True)
class Surroundings:
    """What the report of a run takes from the runs around it.

    Attributes:
        against: Folder of a run on the same images, such as that of a student without a teacher.
        home: Address of the page of the comparison that the run belongs to, relative to the run's folder.
        images: Images that are shown in the embedding, at most.
        timed: Whether the network's passes are timed. Beside other runs, the times would be wrong.
    """

    against: Path | None = None
    home: str | None = None
    images: int = IMAGES
    timed: bool = True

    def without_other(self) -> Self:
        """Return the same without the run to compare with."""
        return replace(self, against=None)


ALONE = Surroundings()


def report_on_prepared(prepared: Prepared, folder: Path, around: Surroundings = ALONE) -> Path:
    """Write the report of a run whose images and networks are in memory; see :func:`report_on`."""
    return _write(folder, prepared.task, prepared.student, prepared.found, around)


def report_on(folder: Path, against: Path | None = None) -> Path:
    """Write ``report.html`` and the model card ``README.md`` of a finished run, from its folder.

    Args:
        folder: The run's folder.
        against: Folder of a run on the same images, such as that of a student without a teacher.

    Raises:
        RunError: A run is not finished, or the two were scored on different images.
    """
    return report_among(folder, Surroundings(against))


def report_among(folder: Path, around: Surroundings) -> Path:
    """Write the report of a finished run among others; see :func:`report_on`."""
    Result.load(folder)
    task, network = task_of(folder), network_of(folder)
    found = readout_classes(folder, task, network) if RunFolder(folder).trained_nothing else None
    return _write(folder, task, network, found, around)


def comparable(ours: Result, theirs: Result) -> bool:
    """Return whether two runs were scored on the same images."""
    return all(ours.data[name] == theirs.data[name] for name in ("fingerprint", "scored"))


def _write(folder: Path, task: Task, network: Backbone, found: Tensor | None, around: Surroundings) -> Path:
    """Write the report of a run.

    Args:
        folder: The run's folder.
        task: Its task.
        network: What is scored: the student, or the teacher whose embedding is classified by a readout.
        found: Class ids of the scored images ``(N,)`` by a readout; None: the classes of the network's highest logits.
        around: The runs around it.
    """
    run, result = RunFolder(folder).run(), Result.load(folder)
    scored = task.test if run.score == "test" else task.val
    about = result.teacher or {}
    licences = [each.get("licence") for each in about.get("teachers", [about])]
    licence = ", ".join(dict.fromkeys(found for found in licences if found))
    headline = ["A single run establishes nothing." if around.home else how_to_know(run)]
    tables: dict[str, list[list[str]]] = {"Accuracy": _accuracies(result)}
    pictures: dict[str, str] = {}
    log = read_json_lines(folder / "log.jsonl")
    if curves := _curves(log):
        pictures["Learning curves: all terms of the loss, and accuracies"] = address(svg(curves))
    if "teachers" in about:
        tables["What each teacher brought"] = teacher_rows(about["teachers"], log)
    worst: list[dict[str, str]] = []
    calibration, matrix, projection = None, None, None
    if len(scored) and int(scored.labels.min()) >= 0:
        labels, probabilities = scored.labels.cpu(), None
        if found is None:
            probabilities = predict(network, scored.pixels, parts=("logits",)).logits.softmax(1)
            found = probabilities.argmax(1)
        confusion = confusion_matrix(found, labels, len(task.classes))
        if (matrix := matrix_of(confusion, task.classes)) is None:
            pictures["Confusion matrix: row true class, column predicted, darker is more"] = _heat_map(confusion)
        pairs = most_confused(confusion, _PAIRS if len(task.classes) <= _MANY else _PAIRS_OF_MANY)
        tables["Most confused classes"] = [["true class", "predicted", "images"]] + [
            [task.classes[true], task.classes[said], str(count)] for true, said, count in pairs
        ]
        if probabilities is not None:
            if len(task.classes) > _TOP5_ABOVE:
                tables["Accuracy"].append(["top-5 accuracy", f"{top_accuracy(probabilities, labels):.2f} %"])
            calibration = reliability(probabilities, labels)
            caption = f"Calibration: expected calibration error {calibration.ece:.3f}"
            pictures[caption] = address(svg(_diagram(calibration)))
            worst = _worst(task, scored.pixels, scored.sources, probabilities, labels)
        projection = projection_of(networks_of(folder, run, task, network), task, scored, around.images)
    tables["Size and speed"] = speed_of(network, task.image_size, around.timed).rows()
    if not_used := _not_used(result):
        tables["Files that are not used, and copies"] = not_used
    if around.against is not None:
        other = Result.load(around.against)
        headline, tables["Classes that gained and lost"] = _compared(folder, around.against, result, other)
    page = Environment(loader=PackageLoader("refilled.report"), autoescape=True).get_template("report.html")
    text = page.render(
        title=f"{Path(run.task).name}: {run.method}, seed {run.seed}",
        sentences=headline,
        home=around.home,
        tables={name: visible(rows) for name, rows in tables.items()},
        pictures=pictures,
        worst=worst,
        matrix=matrix,
        projection=projection,
        notes=[printable(note) for note in result.data["notes"]],
        data=visible(_data(task, result)),
        provenance={
            "command": command_of(run),
            "data fingerprint": result.data["fingerprint"],
            **({"licence of the data": task.licence} if task.licence else {}),
            **_teachers(result.teacher),
            "network": f"{run.student or run.only_teacher}, {result.parameters:,} parameters",
            "time": f"{count_of(round(result.seconds), 'second')}",
            "hardware": _listed(result.hardware),
            "versions": _listed(result.versions),
        },
    )
    write_atomic(folder / "report.html", text.encode("utf-8", "backslashreplace"))
    card = model_card(run, result, licence or None, None if calibration is None else calibration.ece)
    write_atomic(folder / "README.md", card.encode("utf-8", "backslashreplace"))
    return folder / "report.html"


def _teachers(about: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the lines of provenance for each teacher, or for none."""
    if not about:
        return {"teacher": "none"}
    if "teachers" not in about:
        licence = about.get("licence") or "unknown"
        known = {name: value for name, value in about.items() if name != "licence"}
        return {"teacher": _listed(known), "licence of the teacher": licence}
    kept = ("name", "ignored", "fingerprint", "image_size", "embedding", "embedding_dim", "licence")
    each = ({name: teacher[name] for name in kept if teacher.get(name) is not None} for teacher in about["teachers"])
    return {f"teacher {number}": _listed(teacher) for number, teacher in enumerate(each, start=1)}


def _compared(folder: Path, against: Path, ours: Result, theirs: Result) -> tuple[list[str], list[list[str]]]:
    if not comparable(ours, theirs):
        raise RunError(f"{against} was scored on other images than {folder}; name a run on the same task and shots")
    gain = ours.accuracy - theirs.accuracy
    sentence = (
        f"With this seed, {folder.name} reaches {ours.accuracy:.2f} % and {against.name} {theirs.accuracy:.2f} %: "
        f"{gain:+.2f} points. A single seed establishes nothing."
    )
    changes = [
        (a - b, name, a, b)
        for name, a in ours.class_accuracies.items()
        if a is not None and (b := theirs.class_accuracies.get(name)) is not None
    ]
    rows = [[name, f"{a:.1f} %", f"{b:.1f} %", f"{d:+.1f}"] for d, name, a, b in sorted(changes, reverse=True)]
    return [sentence], [["class", folder.name, against.name, "points"], *rows]


def _accuracies(result: Result) -> list[list[str]]:
    values = {
        "accuracy": result.accuracy,
        "balanced accuracy (mean over classes)": result.balanced_accuracy,
        "nearest class mean": result.ncm_accuracy,
        **{f"nearest class mean after stage {name}": stage["ncm_accuracy"] for name, stage in result.stages.items()},
    }
    rows = [
        [name, "unknown" if value is None or value != value else f"{value:.2f} %"] for name, value in values.items()
    ]
    return [["measure", "value"], *rows]


def _data(task: Task, result: Result) -> list[list[str]]:
    size = len(task.classes)
    train, test = (
        torch.bincount(part.labels[part.labels >= 0].cpu(), minlength=size).tolist() for part in (task.train, task.test)
    )
    rows = [[name, str(a), str(b)] for name, a, b in zip(task.classes, train, test, strict=True)]
    return [["class", "training images", "test images"], *rows]


def _not_used(result: Result) -> list[list[str]]:
    """Return the files and images that were not used or are copies, a line for each kind; results may lack some."""
    found = {
        name: Several.from_record(result.data.get(name, {"count": 0, "first": ()}))
        for name in ("ignored", "copies", "left_out")
    }
    unreadable = Several.of(result.data["skipped"], lambda pair: f"{pair[0]} ({pair[1]})")
    rows = {
        "files that are not used": found["ignored"],
        "images that cannot be read": unreadable,
        "images left out, since they equal held-out ones": found["left_out"],
        "copies of other images, kept in the same part": found["copies"],
    }
    lines = [[what, f"{several.count:,}", str(several)] for what, several in rows.items() if several.count]
    return [["", "number", "names"], *lines] if lines else []


def _curves(log: Sequence[Mapping[str, Any]]) -> Figure | None:
    names = [n for n in dict.fromkeys(n for e in log for n in e) if n not in ("stage", "epoch", "lr", "seconds")]
    names = [n for n in names if any(isinstance(e.get(n), int | float) for e in log)]
    if not names:
        return None
    columns = 3
    lines_of = -(-len(names) // columns)
    figure = Figure(figsize=(7.2, 1.7 * lines_of), layout="constrained")
    panels = figure.subplots(lines_of, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        points = [(n, e[name]) for n, e in enumerate(log, 1) if isinstance(e.get(name), int | float)]
        axes.plot(*zip(*points, strict=True), color=COLORS[0], linewidth=1.4)
        axes.set_title(name, fontsize=8, parse_math=False)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return figure


def _diagram(found: Reliability) -> Figure:
    figure = Figure(figsize=(4, 3.4), layout="constrained")
    axes = figure.subplots()
    bins = len(found.counts)
    centers = [(k + 0.5) / bins for k in range(bins)]
    axes.bar(centers, found.accuracy.tolist(), width=0.9 / bins, color=COLORS[0], label="accuracy")
    axes.plot([0, 1], [0, 1], color=COLORS[1], linestyle="--", linewidth=1.2, label="perfectly calibrated")
    axes.set_xlabel("confidence")
    plain_text(axes.legend(frameon=False, fontsize=8))
    return figure


def _heat_map(confusion: Tensor) -> str:
    """Draw the matrix ``(C, C)`` as a PNG, each row as shares of its class."""
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    grey = (255 * (1 - shares.sqrt())).round().to(torch.uint8)
    step = max(2, 480 // len(grey))
    return png(Image.fromarray(grey.repeat_interleave(step, 0).repeat_interleave(step, 1).numpy()))


def _worst(
    task: Task, pixels: Any, sources: Sequence[str], probabilities: Tensor, labels: Tensor
) -> list[dict[str, str]]:
    """Return the most confident errors: picture, file, and predicted class with its probability."""
    confidence, found = probabilities.max(1)
    rows = torch.where(found == labels, -1.0, confidence).argsort(descending=True)[:_WORST]
    rows = rows[found[rows] != labels[rows]]
    images = pixels[rows].cpu().permute(0, 2, 3, 1).contiguous().numpy() if len(rows) else []
    return [
        {
            "picture": png(Image.fromarray(image)),
            "source": printable(sources[row]),
            "said": f"{printable(task.classes[int(found[row])])}, {100 * float(confidence[row]):.0f} %",
            "true": printable(task.classes[int(labels[row])]),
        }
        for row, image in zip(rows.tolist(), images, strict=True)
    ]


def png(image: Image.Image) -> str:
    """Return an image as a ``data:`` URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
