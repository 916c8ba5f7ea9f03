"""A student of classes with hostile names, and the process that serves it."""

import re
import subprocess
import sys
from contextlib import contextmanager

import pytest

import drawn

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

NAMES = ["<img src=x onerror=alert(1)>", "=cmd()", "naïve </script>".replace("/", "⁄")]


@pytest.fixture(scope="package")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    return drawn.folder(root, dict.fromkeys(NAMES, 10), size=(24, 20), tinted=True)


@pytest.fixture(scope="package")
def student(tmp_path_factory, pictures):
    from refilled.config import Run
    from refilled.runs.experiment import distill

    folder = tmp_path_factory.mktemp("served") / "my student"
    settings = {"epochs": 4, "batch_size": 9, "threads": 1, "precision": "32-true"}
    distill(Run(task=str(pictures), student="wrn_10_1", teacher="refilled/letters", **settings), folder)
    return folder


@pytest.fixture(scope="package")
def served():
    """Return a context in which 'refilled serve' runs in a process of its own, with its address."""

    @contextmanager
    def begin(*arguments):
        command = [sys.executable, "-W", "ignore", "-m", "refilled", "serve", *map(str, arguments), "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                address = None
                for line in process.stderr:
                    if found := re.search(r"http://\S+/", line):
                        address = found[0]
                        break
                assert address, "the server did not start"
                yield address, process
            finally:
                process.kill()

    return begin
