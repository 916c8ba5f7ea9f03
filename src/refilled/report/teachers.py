"""The table of a run's page about several teachers."""

from collections.abc import Mapping, Sequence
from typing import Any

from refilled.stages import numbered

_TRUST = ("label_information", "prior")  # reported by a loss that weighs its teacher


def teacher_rows(teachers: Sequence[Mapping[str, Any]], log: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows of the table, with the figures of each teacher's last epoch in the log.

    Args:
        teachers: The entries of the result, one per teacher.
        log: The entries of the run's log.
    """
    last: dict[str, Any] = {}
    for entry in log:
        last |= entry
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
