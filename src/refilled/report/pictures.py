"""Figures: scatter plots of embeddings, line plots, and their encoding for a page or a file."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from textwrap import fill
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional as F

from refilled.data import spread

_GUTTER = 0.08  # between two images, as a share of their side
_SHOWN_PIXELS = 64  # side length of an image in a picture, at most

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


def rows_to_project(labels: Tensor, images: int = 1000) -> Tensor:
    """Return the rows of labels ``(N,)`` that :func:`tsne` shows: the first thousand of the first ten classes."""
    return (labels < len(COLORS)).nonzero().squeeze(1)[:images]


def tsne(embeddings: Mapping[str, Tensor], labels: Tensor) -> Scatter:
    """Project embeddings ``(N, d)`` of the rows of :func:`rows_to_project` to two dimensions.

    References: van der Maaten and Hinton, Visualizing Data using t-SNE, JMLR 2008.
    """
    kept = rows_to_project(labels)
    points = project({name: embedding[kept] for name, embedding in embeddings.items()})
    return Scatter(points, labels[kept].tolist())


def project(embeddings: Mapping[str, Tensor], iterations: int = 1000) -> dict[str, Any]:
    """Bring embeddings ``(N, d)`` of the same N images to two dimensions each, arrays ``(N, 2)``, by t-SNE."""
    return {
        name: TSNE(
            perplexity=min(30, (len(embedding) - 1) / 3), init="pca", random_state=0, max_iter=iterations
        ).fit_transform(embedding.numpy())
        for name, embedding in embeddings.items()
    }


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


def draw_seeds(rows: Mapping[str, Sequence[float]], ylabel: str) -> Figure:
    """Draw one dot per row and seed, with a line for each seed and a bar at each row's mean."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    for seed in zip(*rows.values(), strict=True):
        axes.plot(places, seed, color="#b8bfca", linewidth=0.8, zorder=1)
    for place, (color, values) in enumerate(zip(_repeated(COLORS, len(rows)), rows.values(), strict=True)):
        axes.scatter([place] * len(values), values, color=color, s=18, zorder=2)
        center = mean(values)
        axes.hlines(center, place - 0.28, place + 0.28, color=color, linewidth=2.5, zorder=3)
        axes.annotate(f"{center:.1f}", (place + 0.3, center), va="center", fontsize=9, color=color)
    axes.set_xticks(places, [fill(name, 18) for name in rows], fontsize=9, parse_math=False)
    axes.set_xlim(-0.5, len(rows) - 0.3)
    axes.set_ylabel(ylabel, parse_math=False)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_images(groups: Mapping[str, Tensor], columns: int = 20) -> Figure:
    """Draw images ``(N, 3, S, S)``, uint8, of several groups, one group below another.

    Args:
        groups: The images by the heading of their group.
        columns: Images per line.
    """
    mosaics = {name: _mosaic(pixels, columns) for name, pixels in groups.items()}
    lines = [-(-len(pixels) // columns) for pixels in groups.values()]
    width = 7.2
    figure = Figure(figsize=(width, sum(0.32 + count * width / columns for count in lines)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=lines)[:, 0]
    for axes, (name, mosaic) in zip(panels, mosaics.items(), strict=True):
        axes.imshow(mosaic.numpy(), interpolation="nearest")
        axes.set_title(name, fontsize=9, loc="left", parse_math=False)
        axes.set_axis_off()
    return figure


def examples(labels: Tensor, count: int) -> Tensor:
    """Return ``count`` rows of labels ``(N,)`` to show: an image of each class in turn, until there are enough.

    Images without a label, -1, count as one class, and are spread evenly.
    """
    if (labels < 0).all():
        return spread(len(labels), count)
    order = torch.argsort(labels, stable=True)
    ordered = labels[order]
    turn = torch.arange(len(labels)) - torch.searchsorted(ordered, ordered)  # number of earlier images of its class
    rows = order[torch.argsort(turn, stable=True)][:count]
    return rows[torch.argsort(labels[rows], stable=True)]


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


def _repeated(values: Sequence[str], count: int) -> list[str]:
    return [values[place % len(values)] for place in range(count)]


def _mosaic(pixels: Tensor, columns: int) -> Tensor:
    """Arrange images ``(N, 3, S, S)`` side by side on white, to ``(H, W, 3)``, uint8."""
    size = pixels.shape[-1]
    if size > _SHOWN_PIXELS:
        pixels = F.interpolate(pixels.float(), (_SHOWN_PIXELS, _SHOWN_PIXELS), mode="area").round().to(torch.uint8)
        size = _SHOWN_PIXELS
    step = size + max(1, round(_GUTTER * size))
    canvas = torch.full((-(-len(pixels) // columns) * step, columns * step, 3), 255, dtype=torch.uint8)
    for place, image in enumerate(pixels):
        down, right = (step * part for part in divmod(place, columns))
        canvas[down : down + size, right : right + size] = image.permute(1, 2, 0)
    return canvas


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
