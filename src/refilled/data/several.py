"""Many files or images in few words: how many, and the names of the first ones."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

SHOWN = 5
"""Names that are kept."""


@dataclass(frozen=True)
class Several:
    """How many files or images there are of a kind, and the names of the first ones."""

    count: int = 0
    first: tuple[str, ...] = ()
    """At most :data:`SHOWN` names."""

    @classmethod
    def of(cls, things: Iterable[Any], name: Callable[[Any], str] = str) -> Self:
        """Count things, and name the first ones."""
        found = list(things)
        return cls(len(found), tuple(name(thing) for thing in found[:SHOWN]))

    def record(self) -> dict[str, Any]:
        """Return it as JSON gives it back."""
        return {"count": self.count, "first": list(self.first)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Read what :meth:`record` returned."""
        return cls(int(record["count"]), tuple(record["first"]))

    def __add__(self, other: "Several") -> "Several":
        return Several(self.count + other.count, (self.first + other.first)[:SHOWN])

    def __str__(self) -> str:
        more = f" and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return ", ".join(self.first) + more


NONE = Several()
