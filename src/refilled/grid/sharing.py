"""The tasks of one few-shot test, divided among several processes."""

from collections.abc import Generator, Sequence

from refilled.config import FewShotRun
from refilled.fewshot.evaluation import Testing, batch_accuracies
from refilled.grid.executors import Executor


def shared_testing(jobs: int, executor: Executor) -> Testing:
    """Return a function that tests batches of tasks with ``jobs`` workers and yields the results in order.

    A task depends only on its number, so the result equals that of one process.
    """

    def testing(run: FewShotRun, batches: Sequence[range]) -> Generator[list[float], None, None]:
        with executor(jobs) as pool:
            for future in [pool.submit(batch_accuracies, run, numbers) for numbers in batches]:
                yield future.result()

    return testing
