"""Select classes of a source."""

import re
from collections.abc import Sequence

from refilled.data.keyed import keyed_permutation
from refilled.errors import TaskError, unknown

_RANGE = re.compile("([0-9]{1,9})(?:-([0-9]{1,9}))?")


def select_classes(selection: str | None, classes: Sequence[str], *, seed: int) -> list[int]:
    """Return the positions of the selected classes, ascending.

    Args:
        selection: ``"0-49"``, ``"0-4,7"``, ``"sparrow,crow"``, ``"random-half"``, ``"other-half"`` (the
            complement of the random half of the same seed). None: all classes. A class name takes precedence over a
            number.
        classes: The names of the source's classes, in its order.
        seed: Seed of the halves.

    Raises:
        TaskError: A class is unknown, a range is out of order or out of bounds, or a name belongs to several classes.
    """
    if selection is None:
        return list(range(len(classes)))
    if selection in ("random-half", "other-half"):
        order = keyed_permutation(len(classes), seed, "random-half").tolist()
        half = len(classes) // 2
        return sorted(order[:half] if selection == "random-half" else order[half:])
    chosen: set[int] = set()
    for item in selection.split(","):
        chosen.update(_positions(item.strip(), classes))
    return sorted(chosen)


def _positions(item: str, classes: Sequence[str]) -> Sequence[int]:
    named = [position for position, name in enumerate(classes) if name == item]
    if len(named) > 1:
        raise TaskError(f"classes {', '.join(map(str, named))} are all called '{item}'; select them by number")
    if named:
        return named
    numbers = _RANGE.fullmatch(item)
    if numbers is None:
        numbers_too = f"numbers such as 0-{len(classes) - 1}, random-half and other-half also work"
        raise TaskError(f"{unknown('class', item, classes)}; {numbers_too}")
    first, last = int(numbers[1]), int(numbers[2] or numbers[1])
    if not first <= last < len(classes):
        raise TaskError(f"'{item}' is not a range within the classes 0-{len(classes) - 1}")
    return range(first, last + 1)
