"""Processes that stay for many tests, as the ranks of one world."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from refilled.training.distributed import World, joined

_LAUNCHES = 2  # the first of two was seen to abort now and then
_SECONDS = 120

# A server that has torch loaded, from which processes fork at once.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["refilled.runs.experiment"])


class Ranks:
    """A world of ``size`` processes; a call runs one function on all of them."""

    def __init__(self, size: int) -> None:
        for launch in range(1, _LAUNCHES + 1):
            self._launch(size)
            try:
                self(_ready)
                return
            except EOFError:
                self.close()
                if launch == _LAUNCHES:
                    raise

    def _launch(self, size: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes, self._pipes = [], []
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return ``function(world, *arguments)`` of all ranks: what it returned, or the exception that it raised."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return [self._answer(pipe) for pipe in self._pipes]

    def survivors(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """As a call, but for a rank that dies of it the answer is None."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for pipe in self._pipes:
            try:
                answers.append(self._answer(pipe))
            except (EOFError, ConnectionResetError):
                answers.append(None)
        return answers

    def _answer(self, pipe: Any) -> Any:
        if not pipe.poll(_SECONDS):
            raise TimeoutError("a rank hangs")
        return pipe.recv()

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # the ranks read the end of it, and leave
        for process in self.processes:
            process.join(5)
            process.kill()


def _ready(world: World) -> int:
    return world.largest(world.rank)[0]


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with joined() as world:
        while True:
            try:
                function, arguments = pipe.recv()
            except EOFError:
                return
            try:
                answer = function(world, *arguments)
            except Exception as error:
                answer = error
            pipe.send(answer)
