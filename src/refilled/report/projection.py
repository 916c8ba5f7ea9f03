"""The embedding of test images in two dimensions, as drawings for a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refilled.config import Run
from refilled.data import Split, Task
from refilled.errors import RefilledError
from refilled.models import Backbone
from refilled.report.pictures import COLORS, examples, project
from refilled.runs.folder import RunFolder
from refilled.runs.inference import network_of
from refilled.runs.prepared import initial_student, runs_code
from refilled.runs.result import Result
from refilled.training.evaluation import embed
from refilled.words import count_of, plural, printable

IMAGES = 1000
"""Images that are shown at most."""

_FEWEST = 10  # images
_IN_LEGEND = 20  # classes
_SIDE = 320  # pixels
_BORDER = 8


@dataclass(frozen=True)
class Group:
    """The images of a class."""

    name: str
    color: str
    dots: list[tuple[float, float]]
    """Positions in a panel, in pixels."""


@dataclass(frozen=True)
class Projection:
    """The content of the drawing, for the template.

    Attributes:
        panels: The classes by the name of the network.
        legend: Name and colour of each class; empty if there are too many to distinguish by colour.
        sentence: Description of the drawing, or the reason why there is none.
        side: Side length of a panel in pixels.
    """

    panels: Mapping[str, list[Group]]
    legend: list[tuple[str, str]]
    sentence: str
    side: int = _SIDE


def projection_of(networks: Mapping[str, Backbone], task: Task, images: Split, count: int = IMAGES) -> Projection:
    """Project the embeddings of some images, evenly chosen from the classes, by t-SNE.

    Args:
        networks: The networks by the heading of their panel.
        task: The task, for the names of its classes.
        images: The scored images.
        count: Number of images that are shown at most.
    """
    rows = examples(images.labels.cpu(), count)
    labels = images.labels.cpu()[rows]
    if len(rows) < _FEWEST:
        return _nothing(f"there {plural(len(rows), 'is', 'are')} only {count_of(len(rows), 'image')}")
    if len(labels.unique()) < 2:
        return _nothing("all images are of one class")
    pixels = images.pixels[rows]
    panels = {name: embed(network, pixels) for name, network in networks.items()}
    panels = {name: embedding for name, embedding in panels.items() if _has_shape(embedding)}
    if not panels:
        return _nothing("the embedding hardly differs between images")
    colors = _colors(len(task.classes))
    drawn = {
        name: _groups(points, labels, task.classes, colors) for name, points in project(panels, iterations=500).items()
    }
    shown_classes = sorted(set(labels.tolist()))
    many = len(shown_classes) > _IN_LEGEND
    legend = [] if many else [(printable(task.classes[n]), colors[n]) for n in shown_classes]
    hint = " Point to a dot for its class." if many else ""
    return Projection(
        drawn, legend, f"{len(rows):,} of {len(images):,} images by t-SNE, coloured by class; axes have no unit.{hint}"
    )


def networks_of(folder: Path, run: Run, task: Task, final: Backbone) -> dict[str, Backbone]:
    """Return the networks whose embeddings are shown: before and after the first stage if there are several, and last.

    Args:
        folder: The run's folder.
        run: The run.
        task: Its task.
        final: The network that is scored.
    """
    if run.student is None:
        return {"The embedding that is classified": final}
    stages = [name for name in Result.load(folder).stages if RunFolder(folder).stage(name).exists()]
    if not stages:
        return {"The student's embedding": final}
    first = stages[0]
    networks: dict[str, Backbone] = {}
    if (fresh := _untrained(run, task, final.mean.device)) is not None:
        networks[f"Before the first stage, “{first}”"] = fresh
    networks[f"After the first stage, “{first}”"] = network_of(folder, first)
    networks["At the end"] = final
    return networks


def _untrained(run: Run, task: Task, device: torch.device) -> Backbone | None:
    """Build the student as it was before training; None if its initial weights no longer exist, or are those of code.

    The folder of a run names that code, so a report does not execute it.
    """
    assert run.student is not None  # checked by the caller
    if runs_code(run.student):
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            student, _ = initial_student(run.student, run.pretrained, task)
    except RefilledError:
        return None
    return student.to(device)


def _nothing(reason: str) -> Projection:
    return Projection({}, [], f"There is no picture of the embedding: {reason}.")


def _has_shape(embedding: Tensor) -> bool:
    """Return whether an embedding ``(N, d)`` varies enough for t-SNE."""
    return bool(embedding.isfinite().all()) and embedding.shape[1] > 1 and len(embedding.unique(dim=0)) >= _FEWEST


def _colors(count: int) -> list[str]:
    if count <= len(COLORS):
        return list(COLORS[:count])
    # Neighbours differ in lightness, because their hues are similar.
    return [f"hsl({round(360 * n / count)} 65% {(42, 56, 68)[n % 3]}%)" for n in range(count)]


def _groups(points: Any, labels: Tensor, classes: Sequence[str], colors: Sequence[str]) -> list[Group]:
    """Scale points ``(N, 2)`` to a panel, keeping their proportions, and divide them into classes."""
    low, high = points.min(0), points.max(0)
    scale = (_SIDE - 2 * _BORDER) / max(float((high - low).max()), 1e-12)
    places = (points - (low + high) / 2) * scale + _SIDE / 2
    found: dict[int, list[tuple[float, float]]] = {}
    for label, (x, y) in zip(labels.tolist(), places.tolist(), strict=True):
        found.setdefault(label, []).append((round(x, 1), round(y, 1)))
    return [Group(printable(classes[label]), colors[label], dots) for label, dots in sorted(found.items())]
