"""Carry out many runs, some at a time; a second start does only what is still missing."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from refilled.errors import RunError
from refilled.experiment import Result, distill, resolve, resume
from refilled.run import Run

_SECONDS_TO_SAVE = 10


def run_grid(
    runs: Mapping[str, Run],
    folder: Path,
    jobs: int = 1,
    on_result: Callable[[str, Result], None] | None = None,
) -> dict[str, Result]:
    """Carry out the runs, each in ``folder/<its name>``, in ``jobs`` processes.

    Finished runs are not repeated, interrupted ones go on where they stood. Small models are trained fastest by
    processes of one thread each; set ``threads=1`` in the runs.

    Raises:
        RunError: a folder holds a run of another configuration.
        RefilledError: what a run raised; the others are ended first.
    """
    results = {}
    # Not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker) as pool:
        futures = {pool.submit(_carry_out, run, folder / name): name for name, run in runs.items()}
        try:
            for future in as_completed(futures):
                name = futures[future]
                results[name] = future.result()
                if on_result is not None:
                    on_result(name, results[name])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: results[name] for name in runs}


def _begin_worker() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded, which has not happened yet
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Save the run under way and end when the parent is gone; else a killed grid would leave its workers behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_SAVE)
    os._exit(128 + signal.SIGTERM)


def _carry_out(run: Run, folder: Path) -> Result:
    if not (folder / "run.toml").exists():
        return distill(run, folder)
    found = Run.from_toml((folder / "run.toml").read_text(encoding="utf-8"))
    if resolve(found) != resolve(run):
        raise RunError(f"{folder} holds a run of another configuration; remove it or choose another folder")
    return resume(folder)
