"""A run that is stopped in the middle."""

import os
import signal

from refilled.training.progress import Display


class Stopping(Display):
    """Sends this process SIGTERM after some steps, as a scheduler would."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def step(self, *arguments: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
