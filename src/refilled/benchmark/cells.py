"""From a table to the runs that fill it: what each cell carries out, and where it finds it done already.

A run's folder is named after a digest of its configuration, its teacher's among it. So teachers are trained once,
equal cells of several tables are one run, and a changed setting is another run instead of a wrong one.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from refilled.benchmark.protocols import PROTOCOLS, RECIPES, SCALES, Data, Optimisation, Protocol
from refilled.benchmark.tables import Column, Row, Table
from refilled.errors import RefilledError, RunError, unknown
from refilled.experiment import Result
from refilled.methods import load_method
from refilled.run import Recipe, Run

_EPOCHS_OF_THE_PAPER = 400  # two stages of 200
_DECAY_OF_THE_PAPER = 0.05  # of the weight of local distillation, each epoch
_WHERE = ("data_root", "image_memory", "device", "threads")  # where a run takes place, which is not what it is


@dataclass(frozen=True)
class Choice:
    """What of a table is to be done, and how: the options of ``refilled bench``.

    Attributes:
        scale: One of :data:`~refilled.benchmark.protocols.SCALES`.
        recipe: One of :data:`~refilled.benchmark.protocols.RECIPES`.
        seeds: One run of every cell for each.
        only: Rows, columns and cells to carry out, as ``ROW``, ``/COLUMN`` or ``ROW/COLUMN``; all if empty.
        data_root: As in a run.
        device: As in a run.

    Raises:
        RunError: The scale or the recipe is unknown.
    """

    scale: str = "smoke"
    recipe: str = "paper2020"
    seeds: tuple[int, ...] = (0, 1, 2)
    only: tuple[str, ...] = ()
    data_root: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for kind, name, known in (("scale", self.scale, SCALES), ("recipe", self.recipe, RECIPES)):
            if name not in known:
                raise RunError(unknown(kind, name, known))


@dataclass(frozen=True, eq=False)
class Cell:
    """One row, column and seed of a table."""

    row: Row
    column: Column
    seed: int
    paper: float | None
    student: str
    """Architecture at this scale."""
    run: Run | None
    """None where the teacher is all there is; its own teacher is not filled in."""
    teacher: Run | None

    @property
    def name(self) -> str:
        """What the cell is called, as ``--only`` reads it, with its seed."""
        return f"{self.row.name}/{self.column.name} seed {self.seed}"


def cells(table: Table, choice: Choice) -> list[Cell]:
    """Return all cells of a table, row by row, whatever ``choice.only`` says."""
    return [
        _cell(table, row, column, seed, choice)
        for row in table.rows
        for column in table.columns
        for seed in choice.seeds
        if row.columns is None or column.name in row.columns
    ]


def chosen(table: Table, found: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """Return the cells that ``only`` names.

    Raises:
        RunError: It names a row, a column or a cell that the table does not have.
    """
    rows = {row.name: row for row in table.rows}
    columns = {column.name: column for column in table.columns}
    wanted: set[tuple[str, str]] = set()
    for text in only:
        row, slash, column = text.rpartition("/") if "/" in text else (text, "", "")
        if row and row not in rows:
            raise RunError(unknown("row", row, rows))
        if slash and column not in columns:
            raise RunError(unknown("column", column, columns))
        matching = {
            (cell.row.name, cell.column.name)
            for cell in found
            if row in ("", cell.row.name) and column in ("", cell.column.name)
        }
        if not matching:
            raise RunError(f"'{row}' has no cell in column '{column}'; it has: {', '.join(rows[row].columns or ())}")
        wanted |= matching
    return [cell for cell in found if not only or (cell.row.name, cell.column.name) in wanted]


def _cell(table: Table, row: Row, column: Column, seed: int, choice: Choice) -> Cell:
    protocol, scale = PROTOCOLS[column.protocol], SCALES[choice.scale]
    data, recipe = protocol.data[choice.scale], RECIPES[choice.recipe]
    shared: dict[str, Any] = {
        **recipe.fields,
        "image_size": data.image_size,
        "val": 0.0,
        "threads": 1,
        "data_root": choice.data_root,
        "device": choice.device,
    }
    teacher = Run(
        **{**shared, "epochs": data.epochs or recipe.teacher_epochs},
        task=data.teacher_task,
        student=scale.network(protocol.teacher),
    )
    student = scale.network(column.student)
    run = None
    if row.method is not None:
        run = Run(
            **{**shared, "epochs": _epochs(row, data, recipe), "lr": row.lr or recipe.fields["lr"]},
            task=data.task,
            student=student,
            method=row.method,
            settings=_settings(row, protocol, data, recipe),
            shots=column.shots,
            seed=seed,
        )
    paper = row.paper[table.columns.index(column)]
    return Cell(row, column, seed, paper, student, run, None if row.method == "vanilla" else teacher)


def _epochs(row: Row, data: Data, recipe: Optimisation) -> int:
    return max(1, round(row.epochs * (data.epochs or recipe.fields["epochs"])))


def _settings(row: Row, protocol: Protocol, data: Data, recipe: Optimisation) -> dict[str, Any]:
    if row.method != "refilled":
        return dict(row.settings)
    of_the_protocol = {
        "temperature": protocol.temperature,
        "kd_temperature": protocol.temperature,
        "kd_weight": protocol.kd_weight,
        # In fewer epochs the weight falls as far over a stage as in the paper's.
        "kd_decay": _DECAY_OF_THE_PAPER * _EPOCHS_OF_THE_PAPER / _epochs(row, data, recipe),
    }
    return {**of_the_protocol, **row.settings}


class Plan:
    """The runs behind some cells, and where they lie.

    Args:
        cells: Cells of one table or of several.
        folder: Each run lies in a folder of its own below ``folder``.
    """

    def __init__(self, cells: Sequence[Cell], folder: Path) -> None:
        self.folder = folder
        self.runs: dict[str, Run] = {}
        self.needs: dict[str, str] = {}
        """The name of the run whose student is the teacher, for those runs that have one."""
        self.problems: dict[Cell, RefilledError] = {}
        """Cells whose runs cannot even be described."""
        self._names: dict[Cell, tuple[str, str | None]] = {}  # of a cell's run and of its teacher's
        for cell in cells:
            try:
                self._names[cell] = self._add(cell)
            except RefilledError as error:
                self.problems[cell] = error

    def run_of(self, cell: Cell) -> str | None:
        """Name the run that a cell is about: the student's, or the teacher's where there is no student."""
        return None if cell in self.problems else self._names[cell][0]

    def teacher_of(self, cell: Cell) -> str | None:
        """Name the run of a cell's teacher."""
        return None if cell in self.problems else self._names[cell][1]

    def result(self, name: str | None) -> Result | None:
        """Load the result of a run, if it is finished."""
        if name is None or not (self.folder / name / "DONE").exists():
            return None
        return Result.load(self.folder / name)

    def missing(self, cells: Iterable[Cell]) -> dict[str, Run]:
        """Return the runs behind some cells that are not finished, a teacher before those that it teaches."""
        names = dict.fromkeys(name for cell in cells for name in (self.teacher_of(cell), self.run_of(cell)) if name)
        return {name: self.runs[name] for name in names if self.result(name) is None}

    def _add(self, cell: Cell) -> tuple[str, str | None]:
        teacher = None if cell.teacher is None else self._add_run(cell.teacher)
        if cell.run is None:
            assert teacher is not None  # or the cell would be about nothing
            return teacher, teacher
        run = cell.run if load_method(cell.run.method).takes_student else replace(cell.run, student=None)
        return self._add_run(run, teacher), teacher

    def _add_run(self, run: Run, teacher: str | None = None) -> str:
        name = name_of(replace(run, teacher=teacher))
        if name not in self.runs:
            self._refuse_outdated(name, run)
            self.runs[name] = run if teacher is None else replace(run, teacher=str(self.folder / teacher))
            if teacher is not None:
                self.needs[name] = teacher
        return name

    def _refuse_outdated(self, name: str, run: Run) -> None:
        """Refuse a folder whose run had other defaults than a run has now: a name tells only what is no default."""
        path = self.folder / name / "run.toml"
        if path.exists() and _in_full(Run.from_toml(path.read_text(encoding="utf-8"))) != _in_full(run):
            raise RunError(f"{path.parent} was run when other defaults held; remove it, or choose another --out")


def name_of(run: Run) -> str:
    """Name a run after what it is, with a digest of all that decides its outcome; not of where it takes place.

    Defaults are left out of the digest, so that a parameter that is added later does not rename the runs before it.

    Raises:
        MethodError: The method or one of its parameters is unknown.
    """
    method = load_method(run.method)
    settings = method.settle(run.settings)
    unusual = {key: value for key, value in settings.items() if value != method.parameters[key]}
    named = [f for f in fields(run) if f.name not in (*_WHERE, "settings") and getattr(run, f.name) != f.default]
    decisive = {f.name: getattr(run, f.name) for f in named} | {"settings": unusual}
    digest = sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
    return f"{(run.student or 'teacher').replace('/', '_')}-{Path(run.method).stem}-s{run.seed}-{digest}"


def _in_full(run: Run) -> dict[str, Any]:
    """Return how a run optimises and what its method is set to, defaults included; not what a machine settles."""
    recipe = {f.name: getattr(run, f.name) for f in fields(Recipe) if f.name != "precision"}
    return {**recipe, **load_method(run.method).settle(run.settings)}
