"""Figures: scatter plots of embeddings, line plots, and their encoding for a page or a file."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from sklearn.manifold import TSNE
from torch import Tensor

COLORS = ("#4C72B0", "#DD8452", "#55A868", "#C44E52", "#8172B3", "#937860", "#DA8BC3", "#8C8C8C", "#CCB974", "#64B5CD")


@dataclass(frozen=True)
class Scatter:
    """The same N images in several embeddings, each projected to two dimensions."""

    points: Mapping[str, Any]
    """Arrays ``(N, 2)`` by the name of the embedding."""
    labels: Sequence[int]


@dataclass(frozen=True)
class Line:
    """A row's values at some positions along an axis."""

    name: str
    points: Sequence[tuple[str, float, float]]
    """Position, mean and standard deviation over seeds."""


def tsne(embeddings: Mapping[str, Tensor], labels: Tensor, images: int = 1000) -> Scatter:
    """Project embeddings ``(N, d)`` to two dimensions. At most ten classes and ``images`` images are kept, the first.

    References: van der Maaten and Hinton, Visualizing Data using t-SNE, JMLR 2008.
    """
    kept = (labels < len(COLORS)).nonzero().squeeze(1)[:images]
    project = TSNE(perplexity=min(30, (len(kept) - 1) / 3), init="pca", random_state=0).fit_transform
    points = {name: project(embedding[kept].numpy()) for name, embedding in embeddings.items()}
    return Scatter(points, labels[kept].tolist())


def draw_scatter(scatter: Scatter, classes: Sequence[str]) -> Figure:
    """Draw the embeddings side by side, coloured by class."""
    figure = Figure(figsize=(3.2 * len(scatter.points), 3.6), layout="constrained")
    panels = figure.subplots(1, len(scatter.points), squeeze=False)[0]
    colors = [COLORS[label] for label in scatter.labels]
    for axes, (name, points) in zip(panels, scatter.points.items(), strict=True):
        axes.scatter(points[:, 0], points[:, 1], c=colors, s=6, linewidths=0)
        axes.set_title(name, fontsize=9, parse_math=False)
        axes.set_xticks([])
        axes.set_yticks([])
    dots = [Line2D([], [], color=color, marker="o", linestyle="", markersize=4) for color in COLORS]
    names = [name[:24] for name in classes[: len(COLORS)]]
    inches = 0.5 + 0.065 * max(len(name) for name in names)  # width of a legend column with its dot
    columns = max(1, min(5, int(figure.get_figwidth() / inches)))
    legend = figure.legend(
        dots[: len(names)], names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    plain_text(legend)
    return figure


def draw_lines(lines: Sequence[Line], places: Sequence[str], xlabel: str, ylabel: str) -> Figure:
    """Plot each line over the places, which are equally spaced."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for line, color in zip(lines, COLORS, strict=False):
        at, means, spreads = zip(*line.points, strict=True)
        positions = [places.index(place) for place in at]
        axes.errorbar(
            positions, means, spreads, color=color, label=line.name, marker="o", markersize=4, capsize=3, linewidth=1.6
        )
    axes.set_xticks(range(len(places)), places, parse_math=False)
    axes.set_xlabel(xlabel, parse_math=False)
    axes.set_ylabel(fill(ylabel, 44), parse_math=False)
    axes.grid(alpha=0.25)
    plain_text(figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8))
    return figure


def plain_text(legend: Legend) -> None:
    """Show names verbatim, since a class may be called $x$."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def svg(figure: Figure) -> bytes:
    """Return a figure as SVG. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None}
    with mpl.rc_context({"svg.hashsalt": "refilled"}):
        figure.savefig(buffer, format="svg", metadata=metadata)
    return buffer.getvalue()


def address(picture: bytes) -> str:
    """Return an SVG as a ``data:`` URL. In an image element it cannot run scripts."""
    return f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"
