"""The form of the paper's tables and figures: columns, rows, and what each of them states.

The tables themselves are in :mod:`refilled.paper.tables`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Numbers = tuple[float | None, ...]

Measure = Literal["accuracy", "nmi", "nmi after stage 1", "gradient of kd", "gradient of local kd"]


@dataclass(frozen=True)
class Column:
    """The protocol and student of a column's cells."""

    name: str
    protocol: str
    student: str
    """Architecture, as in the paper."""
    shots: int | None = None
    """Training images of each class; None for all."""
    classes: int | None = None
    """Number of classes that are drawn; only for gradients."""


@dataclass(frozen=True)
class Row:
    """The method of a row's cells, and the paper's numbers for them."""

    name: str
    method: str | None
    """None for a row that only evaluates the teacher."""
    paper: Numbers
    """One number per column. None: the paper prints none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the method, as in ``--set``."""
    columns: tuple[str, ...] | None = None
    """The columns in which the row has cells. None: all."""
    epochs: float = 1.0
    """Epochs relative to those of the other rows."""
    lr: float | None = None
    """Peak learning rate. None: the recipe's."""
    measure: Measure = "accuracy"
    shares: Mapping[str, float] = field(default_factory=dict)
    """Settings that are numbers of epochs, as shares of the epochs of the run, which depend on the scale."""


@dataclass(frozen=True)
class FewShotRow(Row):
    """A row of a table about tasks of few images."""

    backbone: str = "convnet4"
    """Architecture of the frozen model, as in the paper."""
    search: Mapping[str, str] = field(default_factory=dict)
    """Values to try on the validation classes, by parameter of the method."""
    trains: Literal["student", "backbone"] | None = None
    """The network that is trained for each task: the backbone, or a student that starts from a model of the seen
    classes. None: no network."""
    costly: bool = False
    """Whether the method is slow per task, so that small scales run fewer tasks."""


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    unit: str = "test accuracy in percent, after the last epoch"
    teacher: float | None = None
    """Accuracy of the teacher on its own classes, where the paper prints it."""
    mean_over: Literal["seeds", "tasks"] = "seeds"
    """What a cell's number is averaged over."""
    picture: Literal["lines", "t-SNE"] | None = None
    columns_are: str = ""
    """Label of the columns on the axis of a picture."""
    note: str = ""
