"""The tasks of one few-shot test, shared by several processes."""

from collections.abc import Generator, Sequence

from refilled.config import FewShotRun
from refilled.fewshot.evaluation import Testing, batch_accuracies
from refilled.grid.executors import Executor


def shared_testing(jobs: int, executor: Executor) -> Testing:
    """Carry out batches of tasks in ``jobs`` places at a time; they come back in their order.

    A task depends on its number alone, so the result is that of one process.
    """

    def testing(run: FewShotRun, batches: Sequence[range]) -> Generator[list[float], None, None]:
        with executor(jobs) as pool:
            for found in [pool.submit(batch_accuracies, run, numbers) for numbers in batches]:
                yield found.result()

    return testing
