"""The page of a comparison: one HTML file without scripts and without external resources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, PackageLoader
from matplotlib.figure import Figure
from torch import Tensor

from refilled.compare.summary import Gain, mean_and_spread, paired_gain
from refilled.config import Run
from refilled.data import Split, Task
from refilled.files import read_json_lines, write_atomic
from refilled.models import Backbone
from refilled.recipe import Recipe
from refilled.report.pictures import (
    COLORS,
    address,
    draw_images,
    draw_scatter,
    draw_seeds,
    examples,
    plain_text,
    rows_to_project,
    svg,
    tsne,
)
from refilled.runs.folder import RunFolder
from refilled.runs.inference import network_of, task_of, teacher_accuracies, teacher_task_of, teachers_of
from refilled.runs.result import Result
from refilled.training.evaluation import embed
from refilled.words import count_of

_EXAMPLES = 40  # of each group of images


@dataclass(frozen=True)
class RowResults:
    """A row of the comparison: its results, one per seed, and the folders of the runs."""

    name: str
    results: Sequence[Result]
    folders: Sequence[Path]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy of each seed, in percent."""
        return [result.accuracy for result in self.results]

    @property
    def unlabelled(self) -> Mapping[str, Any] | None:
        """The record of the unlabelled images in the result of the first seed; None if there were none."""
        record: Mapping[str, Any] | None = self.results[0].data.get("unlabelled")
        return record

    @property
    def ignored_teacher(self) -> bool:
        """Whether all runs ignored their teacher because of ``guard``."""
        return all((result.teacher or {}).get("ignored", False) for result in self.results)

    def gain_over(self, other: "RowResults") -> Gain:
        """Return the gain over another row, paired by seed."""
        return paired_gain(self.accuracies, other.accuracies)

    def differences_to(self, other: "RowResults") -> list[str]:
        """List the differences in training other than the method, such as ``cutmix 1.0 against 0.0``."""
        ours, theirs = _recipe(self.folders[0]), _recipe(other.folders[0])
        return [f"{name} {value} against {theirs[name]}" for name, value in ours.items() if value != theirs[name]]


def table(rows: Sequence[RowResults], baseline: RowResults) -> list[dict[str, str]]:
    """Return the rows as text by column, each with its gain over the baseline."""
    return [
        {
            "method": row.name,
            "accuracy": mean_and_spread(row.accuracies),
            "nearest class mean": mean_and_spread([result.ncm_accuracy for result in row.results]),
            f"gain over {baseline.name}": "" if row is baseline else str(row.gain_over(baseline)),
            "minutes": f"{sum(result.seconds for result in row.results) / len(row.results) / 60:.1f}",
        }
        for row in rows
    ]


def verdict(row: RowResults, baseline: RowResults) -> str:
    """Return a sentence on whether the teacher helped. A gain from another recipe is not credited to the teacher."""
    gain, seeds = row.gain_over(baseline), len(row.results)
    if differences := row.differences_to(baseline):
        return (
            f"It is not established that the teacher helped: {row.name} and {baseline.name} differ by {gain} points, "
            f"but also in their training ({', '.join(differences)}). Compare with a baseline that is trained alike."
        )
    if row.ignored_teacher:
        return (
            f"The teacher was ignored in all runs of {row.name}, since it has nothing to teach: {gain.mean:+.2f} "
            f"points against {baseline.name}. The notes of each run say why."
        )
    if seeds < 2:
        return f"{row.name} differs by {gain.mean:+.2f} points from {baseline.name}; a single seed establishes nothing."
    interval = f"95 % interval {gain.low:+.2f} to {gain.high:+.2f}, {seeds} seeds"
    if not gain.established:
        return f"It is not established that the teacher helped: {row.name} {gain.mean:+.2f} points ({interval})."
    if gain.mean > 0:
        return f"The teacher helped: {row.name} gains {gain.mean:.2f} points over {baseline.name} ({interval})."
    return f"The teacher hurt: {row.name} loses {-gain.mean:.2f} points against {baseline.name} ({interval})."


def on_the_teacher(row: RowResults, baseline: RowResults) -> str:
    """Return a sentence on the accuracy of the teacher's embedding alone on the same images."""
    found = teacher_accuracies(row.folders[0])
    if not found:
        return f"{row.name} has no teacher."
    if len(found) > 1:
        names = _run(row.folders[0]).teachers
        each = "; ".join(f"{name}: {accuracy:.1f} %" for name, accuracy in zip(names, found, strict=True))
        return f"Test images that nearest class mean classifies correctly in the teachers' embeddings: {each}."
    (accuracy,) = found
    compared = "less" if accuracy < mean(baseline.accuracies) else "more"
    return (
        f"Nearest class mean in the teacher's embedding classifies {accuracy:.1f} % of the test images correctly, "
        f"{compared} than {baseline.name} does."
    )


def on_the_unlabelled(rows: Sequence[RowResults], baseline: RowResults, shown: RowResults) -> list[str]:
    """Return sentences on the gain from unlabelled images alone; empty unless only the shown row has them."""
    if shown.unlabelled is None or baseline.unlabelled is not None:
        return []
    without_teacher = [row for row in rows if row.unlabelled is not None and row.results[0].teacher is None]
    return [
        f"{shown.name} also learned from {count_of(shown.unlabelled['images'], 'image')} without labels, which "
        f"{baseline.name} did not see.",
        *(
            f"From the same images without a teacher, {row.name} reaches {mean(row.accuracies):.1f} %; gain of "
            f"{shown.name} over it: {shown.gain_over(row)} points."
            for row in without_teacher
        ),
    ]


def on_the_cache(row: RowResults) -> list[str]:
    """Return a sentence that compares cached and live embeddings of the teacher; empty if there was no cache."""
    cache = (row.results[0].teacher or {}).get("cache")
    if cache is None:
        return []
    recipe = _recipe(row.folders[0])
    mixed = ", each mixed with another image," if recipe["mixup"] or recipe["cutmix"] else ""
    return [
        f"The teacher's embeddings of {count_of(cache['views'], 'view')} of each image came from disk. Nearest class "
        f"mean classifies {cache['images']} training images{mixed} with {cache['cached_accuracy']:.1f} % accuracy in "
        "them, "
        f"and with {cache['live_accuracy']:.1f} % in the live teacher's embeddings."
    ]


def write_report(
    path: Path,
    title: str,
    rows: Sequence[RowResults],
    baseline: RowResults,
    shown: RowResults,
    sentences: Sequence[str],
) -> None:
    """Write the page: verdict, table, accuracies by seed, images, embeddings (t-SNE, first seed), and curves.

    The figures are also written to ``figures/NAME.svg`` in the same folder.

    Args:
        path: The HTML file.
        title: Heading of the page.
        rows: All methods, including the baseline.
        baseline: The student without a teacher.
        shown: The method that the pictures show.
        sentences: Sentences above the table.
    """
    task = task_of(shown.folders[0])
    held_out = any("val_accuracy" in entry for row in rows for entry in _log(row.folders[0]))
    measure = "val_accuracy" if held_out else "ce"
    curves = "Accuracy on held-out images in percent" if held_out else "Cross-entropy on training images"
    kept = rows_to_project(task.test.labels)
    embedded = embeddings(baseline, shown, task, kept)
    pictures = {
        "Test accuracy in percent, a line for each seed": (
            "accuracy",
            draw_seeds({row.name: row.accuracies for row in rows}, "test accuracy in percent"),
        ),
        "What the teacher was trained on, and what the student sees": ("images", draw_images(_images(shown, task))),
        "Test images in the embedding, coloured by class (t-SNE, first seed)": (
            "embeddings",
            draw_scatter(tsne(embedded, task.test.labels[kept]), list(shown.results[0].class_accuracies)),
        ),
        f"{curves}, mean over seeds": ("curves", _curves(rows, measure)),
    }
    drawn = {caption: (name, svg(figure)) for caption, (name, figure) in pictures.items()}
    (path.parent / "figures").mkdir(exist_ok=True)
    for name, picture in drawn.values():
        write_atomic(path.parent / "figures" / f"{name}.svg", picture)
    result, run = shown.results[0], _run(shown.folders[0])
    loader = ChoiceLoader([PackageLoader("refilled.compare"), PackageLoader("refilled.report")])  # page.html is there
    page = Environment(loader=loader, autoescape=True).get_template("comparison.html")
    text = page.render(
        title=title,
        sentences=sentences,
        rows=table(rows, baseline),
        shown=shown.name,
        seeds=[_run(folder).seed for folder in baseline.folders],
        runs=_runs(path.parent, rows),
        teacher=_report_in(path.parent, path.parent / "teacher"),
        pictures={caption: address(picture) for caption, (_, picture) in drawn.items()},
        provenance={
            "data": f"{result.data['task']}; {_listed(result.data['images'])} images",
            "data fingerprints": ", ".join(dict.fromkeys(r.data["fingerprint"][:16] for r in shown.results)),
            "teacher": (result.teacher or {}).get("name", "none"),
            "recipe": _listed(_recipe(shown.folders[0])),
            shown.name: _listed({"method": run.method, **run.settings}),
            "seeds": len(shown.results),
            "figure": "last epoch, mean ± standard deviation over seeds; gains paired by seed, with 95 % interval",
            "hardware": _listed(result.hardware),
            "versions": _listed(result.versions),
            "runs": str(shown.folders[0].parent),
        },
    )
    write_atomic(path, text.encode())


def _runs(folder: Path, rows: Sequence[RowResults]) -> dict[str, list[tuple[str, str | None]]]:
    """Return each run's accuracy and the address of its report, by row; None without a report."""
    return {
        row.name: [
            (f"{accuracy:.2f}", _report_in(folder, of_run))
            for accuracy, of_run in zip(row.accuracies, row.folders, strict=True)
        ]
        for row in rows
    }


def _report_in(folder: Path, of_run: Path) -> str | None:
    """Return the address of a run's report relative to the folder of the comparison."""
    report = of_run / "report.html"
    return quote(report.relative_to(folder).as_posix()) if report.exists() else None


def _run(folder: Path) -> Run:
    return RunFolder(folder).run()


def _recipe(folder: Path) -> dict[str, Any]:
    run = _run(folder)
    return {field.name: getattr(run, field.name) for field in fields(Recipe) if field.name != "seed"}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def embeddings(baseline: RowResults, shown: RowResults, task: Task, rows: Tensor) -> dict[str, Tensor]:
    """Embed test images with the networks of the first seed.

    The networks are the baseline, the shown student after each stage and at the end, and the teacher if there is one.

    Args:
        baseline: The row without a teacher.
        shown: The row with one.
        task: The task of both.
        rows: Row numbers of the test images, ``(N,)``.

    Returns:
        Embeddings ``(N, d)`` by the name of the network.
    """
    folder = shown.folders[0]
    networks: dict[str, Backbone] = {f"student, {baseline.name}": network_of(baseline.folders[0])}
    for stage in sorted(path.stem for path in (folder / "stages").glob("*.safetensors")):
        networks[f"student, {shown.name}, after stage “{stage}”"] = network_of(folder, stage)
    networks[f"student, {shown.name}"] = network_of(folder)
    teachers = list(teachers_of(folder, task.image_size).values())
    networks |= {"teacher" if len(teachers) == 1 else f"teacher {n}": each for n, each in enumerate(teachers, start=1)}
    pixels = task.test.pixels[rows]
    return {name: embed(network, pixels) for name, network in networks.items()}


def _images(shown: RowResults, task: Task) -> dict[str, Tensor]:
    """Return images of each split of the task, and training images of the teacher if they are available, by heading."""
    parts: dict[str, Split] = {}
    if (of_teacher := teacher_task_of(shown.folders[0])) is not None:
        parts[_heading("The teacher's training images", of_teacher.train, len(of_teacher.classes))] = of_teacher.train
    parts[_heading("The student's labelled images", task.train, len(task.classes))] = task.train
    if task.unlabelled is not None:
        parts[_heading("The student's images without labels", task.unlabelled)] = task.unlabelled
    parts[_heading("The images that the student is scored on", task.test, len(task.classes))] = task.test
    return {name: split.pixels[examples(split.labels, _EXAMPLES)] for name, split in parts.items()}


def _heading(what: str, split: Split, classes: int | None = None) -> str:
    of_classes = "" if classes is None else f" of {classes} classes"
    return f"{what}: {min(len(split), _EXAMPLES)} of {len(split):,}{of_classes}"


def _curves(rows: Sequence[RowResults], measure: str) -> Figure:
    """Draw a measure from the logs against the share of the run, because rows may have different numbers of epochs.

    Stages and methods without the measure leave a gap.
    """
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for row, color in zip(rows, COLORS, strict=False):
        logs = [_log(folder) for folder in row.folders]
        points = [
            (100 * n / len(logs[0]), [e[measure] for e in entries])
            for n, entries in enumerate(zip(*logs, strict=True), 1)
            if measure in entries[0]
        ]
        if not points:
            continue
        axes.plot(
            [n for n, _ in points], [mean(values) for _, values in points], color=color, label=row.name, linewidth=1.6
        )
    axes.set_xlabel("percent of the training, all stages together")
    axes.grid(alpha=0.25)
    plain_text(axes.legend(frameon=False, fontsize=8))
    return figure


def _log(folder: Path) -> list[dict[str, Any]]:
    return read_json_lines(folder / "log.jsonl")
