"""The reports of the runs of a grid: the workers write them, and what is missing is written at the end."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from refilled.grid.executors import Executor, processes
from refilled.report.page import Surroundings, comparable, report_among, report_on_prepared
from refilled.runs.folder import RunFolder
from refilled.runs.prepared import Prepared
from refilled.runs.result import Result
from refilled.words import printable

FEW_IMAGES = 200
"""Images that the report of one of many runs shows in the embedding; more take seconds for each run."""


@dataclass(frozen=True)
class Leave:
    """Write the report of a run that has just finished, as the ``after`` of a grid.

    No error reaches the run. A run that finishes before the one that it is compared with gets no report yet;
    :func:`write_missing` makes up for both.
    """

    surroundings: Surroundings

    def __call__(self, prepared: Prepared, folder: Path) -> None:
        """Write the report. The run's images and networks are still in memory."""
        against = self.surroundings.against
        if against is None or RunFolder(against).finished:
            with suppress(Exception):
                report_on_prepared(prepared, folder, _possible(self.surroundings, folder))


def write_missing(
    surroundings: Mapping[Path, Surroundings], jobs: int = 1, executor: Executor = processes
) -> dict[Path, str]:
    """Write the reports that finished runs lack, from their folders, ``jobs`` at a time.

    Args:
        surroundings: By folder of a run, what its report says about other runs.
        jobs: Number of reports that are written at once.
        executor: Opens the pool of workers.

    Returns:
        The reasons of the reports that could not be written, by folder. No error is raised.
    """
    missing = {
        folder: around
        for folder, around in surroundings.items()
        if RunFolder(folder).finished and not (folder / "report.html").exists()
    }
    failures: dict[Path, str] = {}
    if not missing:
        return failures
    with executor(min(jobs, len(missing))) as pool:
        futures: dict[Path, Future[None]] = {}
        for folder, around in missing.items():
            with _noting(failures, folder):
                futures[folder] = pool.submit(_write, folder, around)
        for folder, future in futures.items():
            with _noting(failures, folder):
                future.result()
    return failures


def no_report(folder: Path, reason: str) -> str:
    """Return the warning that a run has no report."""
    return printable(f"warning: no report was written ({reason}). The run is complete; try: refilled report {folder}")


@contextmanager
def _noting(failures: dict[Path, str], folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        failures[folder] = f"{type(error).__name__}: {error}"


def _write(folder: Path, around: Surroundings) -> None:
    if not (folder / "report.html").exists():  # another process may have been faster
        report_among(folder, _possible(around, folder))


def _possible(around: Surroundings, folder: Path) -> Surroundings:
    """Leave out the other run if it is not finished, or was scored on other images."""
    against = around.against
    if against is None or (RunFolder(against).finished and comparable(Result.load(folder), Result.load(against))):
        return around
    return around.without_other()
