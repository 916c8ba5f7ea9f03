"""What all tests share."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors, and several test processes


def data_root() -> Path:
    """Where the real images lie: $REFILLED_DATA, else beside the repository."""
    return Path(os.environ.get("REFILLED_DATA") or Path(__file__).parents[2] / "shared" / "data").resolve()


@pytest.fixture
def real_data() -> Path:
    """The folder of real images; a test that asks for it is skipped where it is absent."""
    root = data_root()
    if not root.is_dir():
        pytest.skip(f"no real images at {root}; set REFILLED_DATA")
    return root
