"""Checks of the parameters of losses."""

from refilled.errors import MethodError, unknown


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise MethodError if the value is not one of the choices."""
    if value not in choices:
        raise MethodError(unknown(name, value, choices))


def check_positive(**values: float) -> None:
    """Raise MethodError if a value is not greater than 0."""
    for name, value in values.items():
        if not value > 0:
            raise MethodError(f"{name} must be greater than 0, but is {value}")
