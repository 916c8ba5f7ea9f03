"""Worker processes end early, and without finishing their work, when the work fails."""

import os
import time
from pathlib import Path

import pytest

from refilled.workers import worker_processes


def begin(folder: Path) -> None:
    (folder / f"begun-{os.getpid()}").touch()


def work(folder: Path) -> None:
    (folder / "working").touch()
    time.sleep(60)
    (folder / "finished").touch()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failing_block_ends_its_workers_in_the_middle_of_their_work(error, tmp_path):
    def interrupted():
        with worker_processes(1, begin, tmp_path) as pool:
            for _ in range(3):
                pool.submit(work, tmp_path)
            while not (tmp_path / "working").exists():
                time.sleep(0.01)
            raise error

    with pytest.raises(error):
        interrupted()
    (begun,) = tmp_path.glob("begun-*")
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.name.partition("-")[2]), 0)
    assert not (tmp_path / "finished").exists()


def test_calls_return_what_they_return(tmp_path):
    with worker_processes(2, begin, tmp_path) as pool:
        assert list(pool.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
    assert list(tmp_path.glob("begun-*"))
