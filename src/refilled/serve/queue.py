"""Dynamic batching: requests that arrive while a batch is computed form the next batch."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Full(Exception):
    """Too many bytes are waiting."""


class BatchQueue(Generic[Answer]):
    """A queue for a function that answers a batch of pictures per call, on one thread.

    A single request is answered immediately. Under load, batches grow up to ``most`` pictures.

    Args:
        work: Returns an answer for each picture, in their order.
        most: Maximum number of pictures per batch.
        bytes_waiting: Maximum number of bytes that may wait. Above it, :meth:`ask` raises :class:`Full`.
    """

    def __init__(self, work: Callable[[Sequence[bytes]], list[Answer]], most: int, bytes_waiting: int) -> None:
        self._work, self._most, self._room = work, most, bytes_waiting
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start answering in the running event loop."""
        self._queue: asyncio.Queue[tuple[bytes, asyncio.Future[Answer]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "batches")
        self._task = asyncio.create_task(self._answer_batches())

    async def end(self) -> None:
        """Finish the batch that is being computed, and stop."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._thread.shutdown()

    async def ask(self, picture: bytes) -> Answer:
        """Return the answer for a picture.

        Raises:
            Full: Too many bytes are waiting.
        """
        if len(picture) > self._room:
            raise Full
        self._room -= len(picture)
        try:
            future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            self._queue.put_nowait((picture, future))
            return await future
        finally:
            self._room += len(picture)

    async def _answer_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._most and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [(picture, future) for picture, future in batch if not future.done()]  # a client may leave
            if not batch:
                continue
            try:
                answers = await loop.run_in_executor(self._thread, self._work, [picture for picture, _ in batch])
            except Exception as error:  # of any type; only these requests fail
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
