"""Texts for people: numbers with the words that they count, names of flags, names from elsewhere made safe."""


def plural(number: int, one: str, many: str | None = None) -> str:
    """Return the form of a word that fits a number.

    Args:
        number: The number.
        one: The form for 1, such as ``seed`` or ``is``.
        many: The form for all other numbers. None: ``one`` with ``s``, or ``es`` after an ``s``.
    """
    if number == 1:
        return one
    return many or f"{one}{'es' if one.endswith('s') else 's'}"


def count_of(number: int, one: str, many: str | None = None) -> str:
    """Write ``1 seed``, ``3 seeds``, ``2 processes``; see :func:`plural`."""
    return f"{number} {plural(number, one, many)}"


def flag_of(field: str) -> str:
    """Return the flag of a field: ``--batch-size`` of ``batch_size``."""
    return f"--{field.replace('_', '-')}"


def printable(text: str) -> str:
    """Escape control characters and marks of direction, so that a text can neither steer a terminal nor mislead."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
