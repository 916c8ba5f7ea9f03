"""Pools of worker processes that end early if their work fails, or if the process that started them ends."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

_SECONDS_TO_SAVE = 10


@contextmanager
def worker_processes(count: int, begin: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """Open a pool of new processes.

    They are spawned, because torch's threads do not survive a fork. If the block ends with an exception, or this
    process is killed, each worker gets SIGTERM, on which a run saves its state, and ends within ten seconds.

    Args:
        count: Number of processes.
        begin: Called in each process before its first call.
        *arguments: The arguments of ``begin``.
    """
    context = multiprocessing.get_context("spawn")
    # Nothing is ever sent: the workers end when the sending end is closed, by this process or by its end.
    stop, keep_going = context.Pipe(duplex=False)
    with keep_going, stop, ProcessPoolExecutor(count, context, _begin, (stop, begin, *arguments)) as pool:
        try:
            yield pool
        except BaseException:
            keep_going.close()
            pool.shutdown(cancel_futures=True)
            raise


def _begin(stop: Connection, begin: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=_end_early, args=(stop,), daemon=True).start()
    begin(*arguments)


def _end_early(stop: Connection) -> None:
    wait([stop])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_SAVE)
    os._exit(128 + signal.SIGTERM)
