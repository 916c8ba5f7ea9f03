"""Statistics over seeds: means, spreads, and whether a gain over the student alone is established."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isinf, sqrt
from statistics import mean, stdev

from scipy.stats import t as student_t


@dataclass(frozen=True)
class Gain:
    """The mean difference of paired accuracies, in points, with its 95 % interval over seeds."""

    mean: float
    low: float
    high: float

    @property
    def established(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if isinf(self.low):
            return f"{self.mean:+.2f}, one seed, not established"
        interval = f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"
        return interval if self.established else f"{interval}, not established"


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation over seeds, 0 for a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def paired_gain(ours: Sequence[float], theirs: Sequence[float]) -> Gain:
    """Return the mean gain, paired by seed, with Student's t interval. One seed establishes nothing."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    center = mean(differences)
    if len(differences) < 2:
        return Gain(center, float("-inf"), float("inf"))
    half = student_t.ppf(0.975, len(differences) - 1) * stdev(differences) / sqrt(len(differences))
    return Gain(center, center - half, center + half)


def mean_and_spread(values: Sequence[float]) -> str:
    """Write accuracies of several seeds as ``mean ± standard deviation``."""
    return f"{mean(values):.2f} ± {spread(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
