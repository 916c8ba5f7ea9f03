"""How often a test of ``docs/reliability.toml`` repeats its fault: often enough each time, and many times in a soak."""

import os
import tomllib
from pathlib import Path

ROWS = tomllib.loads((Path(__file__).parents[1] / "docs" / "reliability.toml").read_text(encoding="utf-8"))["rows"]
SOAKING = os.environ.get("REFILLED_SOAK") == "1"


def repetitions(row: str) -> int:
    """Return the number of repetitions of a row such as ``R1``, as the page publishes it."""
    usual, soak = ROWS[row]["repetitions"]
    return soak if SOAKING else usual
