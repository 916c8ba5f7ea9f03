"""Draw the pictures of docs/method.md from the raw results: python docs/build_figures.py."""

import csv
from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
BASELINE, OURS, OTHER = "#6b7280", "#0f766e", "#b45309"
ALONE, GOOD = ("vanilla", "student alone"), ("good", "the same", "patient")


def read(name: str) -> dict[str, list[float]]:
    """Return each row's accuracies, seed by seed, in the order of the file."""
    rows: dict[str, list[float]] = {}
    with (DOCS / "results" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            rows.setdefault(line["row"], []).append(float(line["accuracy"]))
    return rows


def draw(name: str, panels: dict[str, dict[str, list[float]]], label: str) -> None:
    """Draw one dot per seed and a bar at each row's mean, one panel below another."""
    heights = [len(rows) for rows in panels.values()]
    figure = Figure(figsize=(7.2, 0.9 + sum(0.28 * n + 0.45 for n in heights)), layout="constrained")
    for axes, (title, rows) in zip(
        figure.subplots(len(panels), 1, squeeze=False, height_ratios=[n + 1 for n in heights])[:, 0],
        panels.items(),
        strict=True,
    ):
        for place, (row, values) in enumerate(rows.items()):
            color = BASELINE if row.startswith(ALONE) else OURS if any(name in row for name in GOOD) else OTHER
            axes.barh(place, mean(values), color=color, alpha=0.25, height=0.7)
            axes.plot(values, [place] * len(values), "o", color=color, markersize=4)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 90)
        axes.set_title(title, fontsize=9, loc="left")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(label)
    (DOCS / "figures").mkdir(exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "refilled"  # the parts of a drawing get the same names every time
    figure.savefig(DOCS / "figures" / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    """Draw all pictures."""
    settings = {
        "birds-long": "Birds, all images",
        "birds-20": "Birds, 20 images per class",
        "birds-10-long": "Birds, 10 images per class",
        "birds-5": "Birds, 5 images per class",
        "cifar100-halves": "CIFAR-100 halves, 50 images per class, 60 epochs",
        "cifar100-halves-long": "The same, 400 epochs",
        "cifar100-halves-200": "Halves, 200 images per class",
        "cifar100-halves-500": "Halves, 500 images per class",
        "cifar10-resnet56": "Halves, 50 images per class, a weak teacher",
    }
    label = "test accuracy in percent after the last epoch; one dot per seed"
    draw("settings", {title: read(name) for name, title in settings.items()}, label)
    choices = {"CIFAR-100 halves, 60 epochs: one change at a time": read("cifar100-halves-choices")}
    draw("choices", choices, label)


if __name__ == "__main__":
    main()
