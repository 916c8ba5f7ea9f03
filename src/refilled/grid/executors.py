"""Executors of many runs: processes on this machine, or Ray on this machine or a cluster.

An executor is a function that opens a :class:`Pool` for a given number of concurrent runs. Ray is imported on demand.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from refilled.errors import RunError, unknown
from refilled.workers import worker_processes

NAMES = ("local", "ray")
RETRIES = 3  # of a run whose worker Ray lost; a run resumes from its last saved state


class Pool(Protocol):
    """A pool of workers that execute calls."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Schedule a call and return its future."""


Executor = Callable[[int], AbstractContextManager[Pool]]


def find_executor(name: str, cpus: float = 1.0, gpus: float = 0.0) -> Executor:
    """Return an executor by its name.

    Args:
        name: One of :data:`NAMES`.
        cpus: CPU cores that Ray reserves per run.
        gpus: Accelerators that Ray reserves per run; with 0.5, two runs share one.

    Raises:
        RunError: The name is unknown, or Ray is not installed.
    """
    if name not in NAMES:
        raise RunError(unknown("executor", name, NAMES))
    if name == "local":
        return processes
    _import_ray()
    return lambda jobs: ray_workers(jobs, cpus, gpus)


@contextmanager
def processes(jobs: int) -> Iterator[Pool]:
    """Open a pool of ``jobs`` single-threaded processes, which save their runs and exit when this process does.

    Raises:
        RunError: The system ended a process, usually because memory ran out.
    """
    try:
        with worker_processes(jobs, _use_one_thread) as pool:
            yield pool
    except BrokenProcessPool as error:
        raise RunError(
            "the system ended a process, usually because memory ran out; repeat the command to resume, with fewer "
            "--jobs if necessary"
        ) from error


@contextmanager
def ray_workers(jobs: int, cpus: float = 1.0, gpus: float = 0.0) -> Iterator[Pool]:
    """Open a pool of Ray workers, on the cluster at ``RAY_ADDRESS`` or in a new Ray instance on this machine.

    On a cluster, its resources determine the number of concurrent runs, and the folders must be on a disk that all
    machines share. On this machine, ``jobs`` determines it; Ray listens only on the loopback address and starts no
    dashboard.
    """
    ray = _import_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="error")
    else:
        ray.init(address="local", num_cpus=jobs * max(cpus, 1), _node_ip_address="127.0.0.1", **quiet)
    try:
        yield _RayPool(ray, cpus, gpus)
    finally:
        ray.shutdown()


class _RayPool:
    """A pool of Ray workers. Ray replaces a lost worker and repeats its call."""

    def __init__(self, ray: Any, cpus: float, gpus: float) -> None:
        self._ray = ray
        variables = {name: value for name, value in os.environ.items() if name.startswith(("REFILLED_", "HF_"))}
        self._call = ray.remote(_call_in).options(
            num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, runtime_env={"env_vars": variables}
        )

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        outcome: Future[Any] = Future()
        exceptions = self._ray.exceptions

        def pass_on(done: Future[Any]) -> None:
            try:
                outcome.set_result(done.result())
            except exceptions.RayTaskError as error:  # the error of the call, wrapped by Ray
                outcome.set_exception(error.cause)
            except exceptions.RayError as error:
                outcome.set_exception(
                    RunError(
                        f"its worker was lost {1 + RETRIES} times ({type(error).__name__}), usually because memory ran "
                        "out; repeat the command to resume, if necessary with more --cpus per run"
                    )
                )

        self._call.remote(Path.cwd(), function, *arguments).future().add_done_callback(pass_on)
        return outcome


def _call_in(folder: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Execute a call in the folder that relative paths refer to."""
    os.chdir(folder)
    return function(*arguments)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise RunError("--executor ray needs Ray: pip install 'refilled[ray]'") from None
    return ray


def _use_one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, which has not happened yet
