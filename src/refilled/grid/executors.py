"""Where many runs are carried out: in processes of this machine, or by Ray on this machine or a cluster.

An executor is a function that, given how many runs at a time, opens a :class:`Pool`. Ray is loaded if it is asked for.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from refilled.errors import RunError, unknown

NAMES = ("local", "ray")
RETRIES = 3  # of a run whose worker Ray lost; a run goes on where its last saved state stood

_SECONDS_TO_SAVE = 10


class Pool(Protocol):
    """Takes calls and carries them out elsewhere."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Have a call carried out, and hand out where its result will be."""


Executor = Callable[[int], AbstractContextManager[Pool]]


def find_executor(name: str, cpus: float = 1.0, gpus: float = 0.0) -> Executor:
    """Find an executor by its name.

    Args:
        name: One of :data:`NAMES`.
        cpus: Processor cores that Ray sets aside for a run.
        gpus: Accelerators likewise; half of one lets two runs share it.

    Raises:
        RunError: There is none of this name, or Ray is not installed.
    """
    if name not in NAMES:
        raise RunError(unknown("executor", name, NAMES))
    if name == "local":
        return processes
    _import_ray()
    return lambda jobs: ray_workers(jobs, cpus, gpus)


@contextmanager
def processes(jobs: int) -> Iterator[Pool]:
    """Open a pool of ``jobs`` processes of one thread each; they save their runs and end when this process does.

    Raises:
        RunError: the system ended a process, most often for want of memory.
    """
    # Not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise RunError(
                "a process was ended by the system, most often for want of memory; the same command goes on where it "
                "stood, with fewer --jobs if need be"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def ray_workers(jobs: int, cpus: float = 1.0, gpus: float = 0.0) -> Iterator[Pool]:
    """Open a pool of Ray's workers: of the cluster at ``RAY_ADDRESS``, or of a Ray of one's own on this machine.

    On a cluster its resources say how many runs there are at a time, and the folders must lie on a disk that all
    machines share. On this machine ``jobs`` says it; nothing listens but on the loopback address, and there is no
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
    """Hands calls to Ray; a worker that is lost is replaced, and its call is made again."""

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
            except exceptions.RayTaskError as error:  # the call's own error, which Ray has wrapped
                outcome.set_exception(error.cause)
            except exceptions.RayError as error:
                outcome.set_exception(
                    RunError(
                        f"its worker was lost {1 + RETRIES} times ({type(error).__name__}), most often for want of "
                        "memory; the same command goes on where it stood, with more --cpus for a run if need be"
                    )
                )

        self._call.remote(Path.cwd(), function, *arguments).future().add_done_callback(pass_on)
        return outcome


def _call_in(folder: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Make a call from the folder that relative paths start at."""
    os.chdir(folder)
    return function(*arguments)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise RunError("--executor ray needs Ray: pip install 'refilled[ray]'") from None
    return ray


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
