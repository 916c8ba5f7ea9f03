"""Ranges of numbers in configurations and on the command line, and the message about a number out of range."""

from collections.abc import Sequence
from dataclasses import dataclass

from refilled.errors import RunError

MOST = 2**31 - 1
"""The largest count or seed. Larger ones overflow in torch or NumPy, or never end."""

_NARROW = 4096  # up to here, a message gives both ends
_LONGEST = 10**30  # digits of a larger number say nothing


@dataclass(frozen=True)
class Range:
    """The numbers from ``least`` to ``most``. NaN is in no range.

    Attributes:
        least: The smallest number.
        most: The largest number.
        above: ``least`` itself is excluded.
        below: ``most`` itself is excluded.
    """

    least: float
    most: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.least < value if self.above else self.least <= value) and (
            value < self.most if self.below else value <= self.most
        )

    def advice(self, value: float) -> str:
        """Return what to give instead of a value that is out of range."""
        low = f"more than {self.least:,}" if self.above else f"{self.least:,} or more"
        high = f"{'below' if self.below else 'at most'} {self.most:,}"
        if self.most > _NARROW:
            return f"give {high}" if value > self.most else f"give {low}"
        return (
            f"give {low} and {high}" if self.above or self.below else f"give a number from {self.least} to {self.most}"
        )


COUNT = Range(1, MOST)
WHOLE = Range(0, MOST)
PIXELS = Range(1, 4096)
THREADS = Range(1, 4096)
SHARE = Range(0, 1)
PART = Range(0, 1, below=True)
POSITIVE = Range(0, 10**6, above=True)
AMOUNT = Range(0, 10**6)
STD = Range(0, 1, above=True)


def check(**given: tuple[float | Sequence[float] | None, Range]) -> None:
    """Check that values, numbers or several of them, are None or in their ranges.

    Args:
        given: By name, the value and its range.

    Raises:
        RunError: A number is out of range.
    """
    for name, (value, allowed) in given.items():
        for number in () if value is None else value if isinstance(value, Sequence) else (value,):
            if number not in allowed:
                raise RunError(f"{name} = {_shown(number)} is out of range; {allowed.advice(number)}")


def check_fields(config: object, **ranges: Range) -> None:
    """Check attributes of a configuration as :func:`check` does."""
    check(**{name: (getattr(config, name), allowed) for name, allowed in ranges.items()})


def _shown(number: float) -> str:
    if isinstance(number, int) and abs(number) > _LONGEST:  # Python refuses to print very long ones
        return f"{'-' if number < 0 else ''}1e{int(abs(number).bit_length() * 0.30103)} or so"
    return str(number)
