"""Execution of many jobs, several at a time. A second start executes only the missing ones."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from refilled.errors import InUseError, RunError
from refilled.grid.executors import Executor, Pool, processes
from refilled.grid.jobs import Job, JobResult, carry_out
from refilled.runs.experiment import After

_SECONDS_BETWEEN_TRIES = 2.0  # to start a run whose lock another process holds


def run_grid(
    runs: Mapping[str, Job],
    folder: Path,
    jobs: int = 1,
    on_result: Callable[[str, JobResult], None] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
    needs: Mapping[str, Sequence[str]] | None = None,
    executor: Executor = processes,
    after: Mapping[str, After] | None = None,
) -> dict[str, JobResult]:
    """Execute the runs, each in ``folder/<its name>``, ``jobs`` at a time.

    Finished runs are not repeated; interrupted ones resume. A run whose lock another process holds is left to that
    process. Free runs are executed first, then the results of the others are awaited. Small models train fastest in
    processes of one thread each; set ``threads=1`` in the runs.

    Args:
        runs: The runs by name.
        folder: Parent of their folders.
        jobs: Number of concurrent runs.
        on_result: Called with each result.
        on_failure: Called with each run that fails, and each run that needs it; the others continue. None: the first
            failure ends all runs.
        needs: The names of the runs whose models a run reads; they are executed first.
        executor: Opens the pool of workers.
        after: By name of a training run, what its worker calls when the run has finished; it must raise no error.

    Returns:
        The results of the runs that did not fail, in the order of ``runs``.

    Raises:
        RefilledError: A run raised it and ``on_failure`` is None; the other runs are ended first.
        RunError: The system ended a process, usually because memory ran out.
    """
    grid = _Grid(runs, folder, needs or {}, on_result, on_failure, after or {})
    with executor(jobs) as pool:
        grid.carry_out(pool)
    return {name: grid.results[name] for name in runs if name in grid.results}


class _Grid:
    """The state of a grid: waiting and running runs, results and failures."""

    def __init__(
        self,
        runs: Mapping[str, Job],
        folder: Path,
        needs: Mapping[str, Sequence[str]],
        on_result: Callable[[str, JobResult], None] | None,
        on_failure: Callable[[str, Exception], None] | None,
        after: Mapping[str, After],
    ) -> None:
        self.runs, self.folder, self.needs, self.after = runs, folder, needs, after
        self.on_result, self.on_failure = on_result, on_failure
        self.results: dict[str, JobResult] = {}
        self.failed: set[str] = set()
        self._waiting = dict.fromkeys(runs, 0.0)  # earliest time to start
        self._under_way: dict[Future[JobResult], str] = {}

    def carry_out(self, pool: Pool) -> None:
        while self._waiting or self._under_way:
            self._start(pool)
            if not self._under_way:
                time.sleep(_SECONDS_BETWEEN_TRIES / 4)
                continue
            done, _ = wait(self._under_way, _SECONDS_BETWEEN_TRIES, FIRST_COMPLETED)
            for future in done:
                self._take(self._under_way.pop(future), future)

    def _start(self, pool: Pool) -> None:
        for name, earliest in list(self._waiting.items()):
            needed = self.needs.get(name, ())
            if failed := [other for other in needed if other in self.failed]:
                del self._waiting[name]
                self._fail(name, RunError(f"it needs {failed[0]}, which failed"))
            elif time.monotonic() >= earliest and all(other in self.results for other in needed):
                del self._waiting[name]
                self._under_way[pool.submit(carry_out, self.runs[name], self.folder / name, self.after.get(name))] = (
                    name
                )

    def _take(self, name: str, future: Future[JobResult]) -> None:
        try:
            result = future.result()
        except InUseError:
            self._waiting[name] = time.monotonic() + _SECONDS_BETWEEN_TRIES
        except BrokenProcessPool:
            raise
        except Exception as error:  # any kind: one failed run must not end the others
            self._fail(name, error)
        else:
            self.results[name] = result
            if self.on_result is not None:
                self.on_result(name, result)

    def _fail(self, name: str, error: Exception) -> None:
        if self.on_failure is None:
            raise error
        self.failed.add(name)
        self.on_failure(name, error)
