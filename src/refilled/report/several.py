"""The table of a run's page about several teachers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refilled.stages import numbered

_TRUST = ("label_information", "prior")  # what a loss that weighs its teacher reports


def teacher_rows(teachers: Sequence[Mapping[str, Any]], log: Path) -> list[list[str]]:
    """Return the rows of the table, with the figures of each teacher's last epoch in the log.

    Args:
        teachers: What the result says of each teacher.
        log: The run's ``log.jsonl``.
    """
    last: dict[str, Any] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        last.update(json.loads(line))
    rows = [["teacher", "label information", "trust", "weight", "terms of the loss, last epoch"]]
    for number, teacher in enumerate(teachers):
        trusted = {name: last.get(numbered(name, number)) for name in _TRUST}
        trust = ", ".join(
            f"{name.replace('_', ' ')} {value:.3f}" for name, value in trusted.items() if value is not None
        )
        terms = ", ".join(f"{name} {last[name]:.4g}" if name in last else name for name in teacher["terms"])
        known = teacher["label_information"]
        rows.append(
            [
                f"{number + 1}: {teacher['name']}",
                "unknown" if known is None else f"{known:.3f}",
                "ignored" if teacher["ignored"] else trust or "not weighed",
                f"{teacher['weight']:.2f}",
                terms or "none",
            ]
        )
    return rows
