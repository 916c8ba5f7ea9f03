"""The search space of a tuning: one text per parameter, as in ``--search`` and ``--tune``.

A range is ``LOW..HIGH``, or ``LOW..HIGH:log`` to draw on a logarithmic scale. Choices are ``THIS,THAT``.
"""

import re
from typing import TYPE_CHECKING, Any, get_args

from refilled.errors import RunError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_RANGE = re.compile(r"(.+?)\.\.(.+?)(:log)?")


def parse_values(name: str, hint: Any, text: str) -> tuple["BaseDistribution", list[str]]:
    """Parse the values to try for a parameter.

    Args:
        name: The parameter, for messages.
        hint: Its annotation. A range needs ``int`` or ``float``, or a union with one of them.
        text: A range or choices.

    Returns:
        The distribution for Optuna, and the texts of its choices or of the two ends of its range. Not every value of
        the annotated type is valid for the parameter, so the caller checks these texts.

    Raises:
        RunError: The text is not a range, the parameter is not a number but has a range, or Optuna is not installed.
    """
    distributions = import_optuna().distributions
    bounds = _RANGE.fullmatch(text)
    if bounds is None:
        choices = [choice.strip() for choice in text.split(",")]
        return distributions.CategoricalDistribution(choices), choices
    types = (hint, *get_args(hint))
    if int not in types and float not in types:
        raise RunError(f"{name} is not a number and has no range; list the values to try, as in {name}=this,that")
    number, distribution = (
        (int, distributions.IntDistribution) if int in types else (float, distributions.FloatDistribution)
    )
    low, high, log = bounds.groups()
    try:
        return distribution(number(low), number(high), log=log is not None), [low, high]
    except ValueError as error:
        raise RunError(
            f"{name}={text} is not a range: {error}; write {name}=LOW..HIGH or {name}=LOW..HIGH:log"
        ) from None


def import_optuna() -> Any:
    """Import Optuna without its messages about each trial.

    Raises:
        RunError: It is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise RunError("tuning needs Optuna, which is not installed: pip install 'refilled[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
