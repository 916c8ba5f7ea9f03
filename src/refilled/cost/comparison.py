"""The predicted cost of a comparison (``refilled compare --dry-run``)."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from refilled.compare.comparison import Comparison, place_of
from refilled.config import Run
from refilled.cost.run import Forecast, forecast, on_made_up_images
from refilled.models import save_model
from refilled.runs.folder import RunFolder
from refilled.runs.prepared import resolve
from refilled.training.progress import duration
from refilled.words import count_of


def forecast_comparison(comparison: Comparison, folder: Path, jobs: int = 1) -> Iterator[str]:
    """Yield lines with the predicted time of what is missing of a comparison. Nothing is written to its folder.

    Each row is predicted from a few steps of its first missing run, as by :func:`refilled.cost.run.forecast`. A teacher
    that is not trained yet is replaced by an untrained network, which takes the same time. The embeddings of a cache
    are counted in each run, though runs with the same views share them, so the prediction is too high there.

    Args:
        comparison: The comparison.
        folder: Folder of its runs.
        jobs: Number of concurrent runs.

    Raises:
        RefilledError: A run has a fault that can be found before training.
    """
    with TemporaryDirectory() as scratch:
        missing = _missing(comparison, folder, Path(scratch))
        if not missing:
            yield "nothing is left to do"
            return
        predicted = {name: forecast(runs[0]) for name, runs in missing.items()}
    first = predicted.pop("teacher").total if "teacher" in predicted else 0.0  # no other run begins before its end
    rest = sum(len(missing[name]) * each.total for name, each in predicted.items())
    runs = sum(map(len, missing.values()))
    # The last runs leave some processes without work; no run is divided among processes.
    longest = max((each.total for each in predicted.values()), default=0.0)
    total = first + max(rest / jobs, longest)
    yield f"{count_of(runs, 'run')} to do, about {duration(total)} in {count_of(jobs, 'process')}:"
    if first:
        yield f"  teacher: {duration(first)}"
    for name, each in predicted.items():
        yield f"  {name}: {count_of(len(missing[name]), 'run')}, {duration(each.total)} each{_memory(each)}"


def _memory(predicted: Forecast) -> str:
    return "" if predicted.memory is None else f", {predicted.memory / 2**30:.2f} GiB"


def _missing(comparison: Comparison, folder: Path, scratch: Path) -> dict[str, list[Run]]:
    """Return the runs that are not finished, by row, and the training of the teacher as ``teacher``."""
    missing = {}
    stand_in = None
    if comparison.teacher is not None and not RunFolder(folder / "teacher").finished:
        missing["teacher"] = [comparison.teacher]
        stand_in = str(scratch / "teacher")
        _, untrained = on_made_up_images(resolve(comparison.teacher))
        save_model(untrained.student, Path(stand_in))
    for name, row in comparison.grid(folder).items():
        runs = [run for seed, run in row.items() if not RunFolder(folder / place_of(name, seed)).finished]
        if stand_in is not None:
            runs = [replace(run, teacher=stand_in) if run.teacher is not None else run for run in runs]
        if runs:
            missing[name] = runs
    return missing
