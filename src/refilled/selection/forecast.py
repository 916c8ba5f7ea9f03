r"""A forecast of the gain of a teacher, fitted to the measurements of this project.

The model has two parameters. The gain in percentage points is

.. math:: c \cdot e / (1 + n / n_0)

with the teacher's excess e over the pixels and n labels per class. The gain is 0 if the teacher separates the classes
no better than the pixels. A teacher counts like a fixed number of labels per class, as in the preset ``good``.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).parent / "forecast.json"
"""Written by ``python docs/build_forecast.py``."""

_WORTHS = np.logspace(0, 3, 301)  # labels per class


@dataclass(frozen=True)
class Features:
    """The inputs of the forecast.

    Attributes:
        excess: Accuracy of the nearest class mean in the teacher's embedding minus that in the pixels, on held-out
            images, in percentage points; 0 if it is negative.
        labels_per_class: Mean number of labelled training images per class.
    """

    excess: float
    labels_per_class: float

    @classmethod
    def of(cls, teacher_accuracy: float, pixel_accuracy: float, labels_per_class: float) -> Self:
        """Return the features from two accuracies in percent and the number of labels per class."""
        return cls(max(0.0, teacher_accuracy - pixel_accuracy), labels_per_class)


@dataclass(frozen=True)
class Model:
    """The fitted model.

    Attributes:
        share: Gain per point of excess, with few labels (c).
        worth: Labels per class that halve the gain (n0).
        fewest: Smallest number of labels per class among the measured settings.
        most: Largest number.
        settings: Number of measured settings.
        data_sets: Their data sets.
        error: Root mean square error in percentage points, of settings whose data set was left out of the fit.
        rank_correlation: Spearman's correlation of forecasts with measured gains, left out in the same way.
    """

    share: float
    worth: float
    fewest: float
    most: float
    settings: int
    data_sets: tuple[str, ...]
    error: float
    rank_correlation: float

    def gain(self, features: Features) -> float:
        """Return the forecast in percentage points."""
        return self.share * features.excess / (1 + features.labels_per_class / self.worth)

    def extrapolates(self, features: Features) -> bool:
        """Return whether there are fewer or more labels per class than in any measured setting."""
        return not self.fewest <= features.labels_per_class <= self.most

    def to_json(self) -> str:
        """Return the text of the model's file."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the model that :meth:`to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "data_sets": tuple(values["data_sets"])})


@cache
def load_forecast() -> Model:
    """Return the model that comes with the package."""
    return Model.from_json(FILE.read_text(encoding="utf-8"))


def fit(features: Sequence[Features], gains: Sequence[float], data_sets: Sequence[str]) -> tuple[Model, list[float]]:
    """Fit the model, and forecast each setting from the settings of the other data sets.

    Args:
        features: Features of S settings.
        gains: Measured gains in percentage points.
        data_sets: The data set of each setting; at least two differ.

    Returns:
        The model of all settings, and the forecast of each setting by a model that was fitted without its data set.
    """
    from scipy.stats import spearmanr

    excess = np.array([one.excess for one in features])
    labels = np.array([one.labels_per_class for one in features])
    y, names = np.asarray(gains, dtype=float), np.array(data_sets)
    left_out = np.empty(len(y))
    for name in sorted(set(data_sets)):
        rest = names != name
        share, worth = _least_squares(excess[rest], labels[rest], y[rest])
        left_out[~rest] = share * excess[~rest] / (1 + labels[~rest] / worth)
    share, worth = _least_squares(excess, labels, y)
    model = Model(
        share=round(share, 4),
        worth=round(worth, 2),
        fewest=round(float(labels.min()), 2),
        most=round(float(labels.max()), 2),
        settings=len(y),
        data_sets=tuple(sorted(set(data_sets))),
        error=round(float(np.sqrt(np.mean((left_out - y) ** 2))), 2),
        rank_correlation=round(float(spearmanr(left_out, y).statistic), 3),
    )
    return model, left_out.tolist()


def _least_squares(excess: NDArray[Any], labels: NDArray[Any], y: NDArray[Any]) -> tuple[float, float]:
    """Return the share, 0 or more, and the worth, from a grid, with the smallest squared error."""
    best = (np.inf, 0.0, 1.0)
    for worth in _WORTHS.tolist():
        x = excess / (1 + labels / worth)
        share = max(0.0, float(x @ y) / max(float(x @ x), 1e-12))
        best = min(best, (float(((y - share * x) ** 2).sum()), share, worth))
    return best[1], best[2]
