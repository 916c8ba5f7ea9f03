"""What all tests share."""

import json
import os
import runpy
import shutil
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from drawn import picture, put
from soak import ROWS

torch.set_num_threads(1)  # small tensors, and several test processes

# Neither this process nor those that it starts may reach other machines.
BLOCKED = str(Path(__file__).parent / "blocked")
os.environ["PYTHONPATH"] = os.pathsep.join([BLOCKED, *filter(None, [os.environ.get("PYTHONPATH")])])
runpy.run_path(f"{BLOCKED}/sitecustomize.py")


def pytest_collection_modifyitems(items):
    """Mark the tests that docs/reliability.toml names, so that ``-m fault`` selects them."""
    faults = {test for row in ROWS.values() for test in row["tests"]}
    for item in items:
        name = item.nodeid.partition("[")[0].removeprefix("tests/")
        if name in faults:
            item.add_marker("fault")


def data_root() -> Path:
    """Return the folder of real images: $REFILLED_DATA, or next to the repository."""
    return Path(os.environ.get("REFILLED_DATA") or Path(__file__).parents[2] / "shared" / "data").resolve()


@pytest.fixture
def real_data() -> Path:
    """Return the folder of real images. Tests that need it are skipped if it is absent."""
    root = data_root()
    if not root.is_dir():
        pytest.skip(f"no real images at {root}; set REFILLED_DATA")
    return root


class InProcess:
    """An executor that runs its calls at once in this process and records them."""

    def __init__(self) -> None:
        self.jobs: list[int] = []
        self.calls: list[tuple] = []

    @contextmanager
    def __call__(self, jobs):
        self.jobs.append(jobs)
        yield self

    def submit(self, function, *arguments):
        self.calls.append((function, *arguments))
        outcome = Future()
        outcome.set_result(function(*arguments))
        return outcome


@pytest.fixture
def in_process() -> InProcess:
    """Return a new in-process executor."""
    return InProcess()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve classes of random colours, 12 noisy pictures each; one unseen class has 6 only."""
    root = tmp_path_factory.mktemp("photos")
    names = [f"c{n:02}" for n in range(12)]
    for place, colour in enumerate(np.random.default_rng(0).integers(0, 255, (12, 3))):
        for number in range(6 if place == 11 else 12):
            put(root / names[place] / f"{number:02}.png", picture((place, number), tint=colour))
    split = {"seen": names[:5], "val": names[5:8], "unseen": names[8:]}
    (root / "split.json").write_text(json.dumps(split))
    return root


@pytest.fixture(scope="session")
def trained_teacher(tmp_path_factory) -> Path:
    """Train a small network on the digits 0-4; return its folder, which no test may change."""
    from refilled.config import Run
    from refilled.runs.experiment import distill

    run = tmp_path_factory.mktemp("teacher") / "run"
    settings = {"epochs": 8, "batch_size": 20, "shots": 40, "threads": 1, "precision": "32-true"}
    distill(Run(task="digits:0-4", student="wrn_10_1", **settings), run)
    return run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, trained_teacher) -> str:
    """Return the folder of a small network of the digits 0-4, of which each module has a copy."""
    return str(shutil.copytree(trained_teacher, tmp_path_factory.mktemp("teacher") / "run"))
