"""Numbers with the words that they count."""


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
