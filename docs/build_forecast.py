"""Fit the forecast of `refilled teachers` to the measured settings: python docs/build_forecast.py [--measure].

Gains come from docs/results/*.csv, settings from docs/forecast.toml, features from docs/forecast-features.csv. With
`--measure` the features are computed first, which needs REFILLED_DATA and takes minutes. Then
src/refilled/selection/forecast.json and a table of docs/teachers.md are written.
"""

import csv
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from scipy.stats import spearmanr

from refilled.selection.forecast import FILE, Features, Model, fit

DOCS = Path(__file__).parent
FEATURES = DOCS / "forecast-features.csv"
PAGE = DOCS / "teachers.md"
COLUMNS = (
    "setting",
    "images",
    "classes",
    "labels_per_class",
    "pixels",
    "nearest_class_mean",
    "linear_probe",
    "label_information",
    "logme",
    "source",
)
BEGIN, END = "<!-- forecast -->", "<!-- /forecast -->"
_MACHINE = ("task", "shots", "teacher", "teacher_mean", "teacher_std", "teacher_size")


def settings() -> list[dict[str, Any]]:
    """Return the settings of docs/forecast.toml."""
    return tomllib.loads((DOCS / "forecast.toml").read_text(encoding="utf-8"))["setting"]


def gain_of(setting: Mapping[str, Any]) -> tuple[float, int]:
    """Return the mean gain in percentage points over the seeds that both rows have, and their number."""
    file, _, row = setting.get("baseline", "").rpartition(": ")
    alone = _accuracies(file or setting["name"], row or None)
    taught = _accuracies(setting["name"], setting["row"])
    seeds = alone.keys() & taught.keys()
    return mean(taught[seed] - alone[seed] for seed in seeds), len(seeds)


def _accuracies(name: str, row: str | None) -> dict[str, float]:
    """Return a row's accuracy of each seed; None: the first row."""
    with (DOCS / "results" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    row = lines[0]["row"] if row is None else row
    value = "accuracy" if "accuracy" in lines[0] else "value"
    return {line["seed"]: float(line[value]) for line in lines if line["row"] == row}


def measured_features() -> dict[str, dict[str, str]]:
    """Return the rows of docs/forecast-features.csv by setting."""
    with FEATURES.open(encoding="utf-8", newline="") as file:
        return {line["setting"]: line for line in csv.DictReader(file)}


def forecast() -> tuple[Model, list[tuple[dict[str, Any], Features, float, float, dict[str, str]]]]:
    """Fit the model; return it, and each setting with its features, its gain, and its forecast when left out."""
    rows, found = settings(), measured_features()
    features = [
        Features.of(*(float(found[s["name"]][c]) for c in ("nearest_class_mean", "pixels", "labels_per_class")))
        for s in rows
    ]
    gains = [gain_of(setting)[0] for setting in rows]
    model, left_out = fit(features, gains, [setting["data"] for setting in rows])
    lines = [found[setting["name"]] for setting in rows]
    return model, list(zip(rows, features, gains, left_out, lines, strict=True))


def table() -> str:
    """Return the text between the marks of docs/teachers.md."""
    model, rows = forecast()
    header = "| setting | labels per class | nearest class mean | pixels | forecast | gain |"
    lines = [header, "|---|---:|---:|---:|---:|---:|"]
    for setting, features, gain, guess, found in sorted(rows, key=lambda row: -row[2]):
        mark = "" if found["source"] == "measured" else " *"
        ncm, pixels = float(found["nearest_class_mean"]), float(found["pixels"])
        cells = f"{features.labels_per_class:.0f} | {ncm:.1f}{mark} | {pixels:.1f} | {guess:+.1f} | {gain:+.1f}"
        lines.append(f"| `{setting['name']}` | {cells} |")
    within = []
    for name in model.data_sets:
        some = [(guess, gain) for setting, _, gain, guess, _ in rows if setting["data"] == name]
        within.append(f"{name} {_spearman(some):+.2f} ({len(some)})")
    by_input: dict[tuple[str, Features], list[tuple[float, float]]] = {}
    for setting, features, gain, guess, _ in rows:
        by_input.setdefault((setting["data"], features), []).append((guess, gain))
    distinct = [
        (mean(guesses), mean(gains)) for guesses, gains in (zip(*some, strict=True) for some in by_input.values())
    ]
    rank, count = model.rank_correlation, model.settings
    verdict = "The bar of 0.7 is met." if rank >= 0.7 else "**The bar of 0.7 is missed.**"
    summary = (
        f"Spearman's rank correlation between forecasts and gains is **{rank:+.2f}** over {count} settings. {verdict}\n"
        f"Settings that differ only in the student or its epochs have the same forecast. Averaged, {len(distinct)} are "
        f"left, with a correlation of {_spearman(distinct):+.2f}.\n"
        f"Within one data set it is: {', '.join(within)}. The root mean square error is {model.error:.1f} points."
    )
    return "\n".join([summary, "", *lines])


def _spearman(pairs: Sequence[tuple[float, float]]) -> float:
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def write() -> None:
    """Write the model's file and the table of the page."""
    model, _ = forecast()
    FILE.write_text(model.to_json(), encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    between = re.compile(f"{BEGIN}.*{END}", re.DOTALL)
    PAGE.write_text(between.sub(lambda _: f"{BEGIN}\n{table()}\n{END}", page), encoding="utf-8")


def measure() -> Iterator[dict[str, Any]]:
    """Compute the features of each setting on one thread; equal settings once.

    Where each seed of a comparison draws its own images, the features are means over its seeds.
    """
    from refilled.config import Run

    done: dict[str, dict[str, Any]] = {}
    for setting in settings():
        file = DOCS / "comparisons" / f"{setting.get('like', setting['name'])}.toml"
        comparison = tomllib.loads(file.read_text(encoding="utf-8")) if file.exists() else {"run": {}}
        values = {**comparison["run"], **setting}
        given = {name: values[name] for name in _MACHINE if name in values}
        with TemporaryDirectory() as folder:
            if "nearest_class_mean" in setting:
                given.pop("teacher", None)
            elif "teacher" not in given:
                given["teacher"] = _train(Path(folder), comparison["teacher"])
            seeds = comparison.get("seeds", [0]) if "shots" in given else [0]
            key = repr(sorted(given.items()))
            if key not in done:
                by_seed = [_features(Run(**given, seed=seed, val=0.0, threads=1)) for seed in seeds]
                done[key] = {name: round(mean(found[name] for found in by_seed), 4) for name in by_seed[0]}
        published = {
            name: setting[name] for name in ("nearest_class_mean", "labels_per_class", "source") if name in setting
        }
        row = {"setting": setting["name"], **done[key], "source": "measured"} | published
        print(row, flush=True)
        yield row


def _features(run: Any) -> dict[str, float]:
    from refilled.losses.trust import label_information
    from refilled.runs.prepared import examine
    from refilled.selection.measures import logme
    from refilled.selection.ranking import Bench

    bench = Bench(run)
    found: dict[str, float] = {
        "images": len(bench.labels),
        "classes": bench.classes,
        "labels_per_class": bench.labels_per_class,
        "pixels": bench.pixels.percent,
    }
    if run.teacher is None:
        return found
    teacher = bench.load(run.teacher, None)
    examine(teacher, bench.task.train, run.teacher)
    embedding = bench.embed(teacher, run.teacher, None)
    return found | {
        "nearest_class_mean": bench.accuracy(embedding).percent,
        "linear_probe": bench.probe(embedding).percent,
        "label_information": label_information(embedding, bench.labels),
        "logme": logme(embedding, bench.labels),
    }


def _train(folder: Path, recipe: Mapping[str, Any]) -> str:
    from refilled.config import Run
    from refilled.runs.experiment import distill

    distill(Run(**{"threads": 1, **recipe}), folder / "teacher")
    return str(folder / "teacher")


def main() -> None:
    """Measure if asked to, fit and write."""
    if "--measure" in sys.argv[1:]:
        rows = list(measure())
        with FEATURES.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    write()


if __name__ == "__main__":
    main()
