"""The jobs that fill a table: what each cell runs, and where finished results are."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from refilled.config import YOUNGER, FewShotRun, MetaRun, Run
from refilled.errors import RefilledError, RunError, unknown
from refilled.fewshot.methods import list_meta_learners
from refilled.files import read_toml
from refilled.grid.jobs import FewShotTest, Job, JobResult, load, name_of
from refilled.methods import load_method
from refilled.paper.protocols import FEW_SHOT, PROTOCOLS, RECIPES, SCALES, Data, PaperRecipe, Protocol
from refilled.paper.schema import Column, FewShotRow, Row, Table
from refilled.recipe import Recipe
from refilled.runs.experiment import refuse_other_images
from refilled.runs.folder import RunFolder
from refilled.runs.prepared import with_absolute_paths

_EPOCHS_OF_THE_PAPER = 400  # two stages of 200
_DECAY_OF_THE_PAPER = 0.05  # of the weight of local distillation, each epoch


@dataclass(frozen=True)
class Choice:
    """The part of a table to reproduce, and how: the options of ``refilled reproduce``.

    Attributes:
        scale: One of :data:`~refilled.paper.protocols.SCALES`.
        recipe: One of :data:`~refilled.paper.protocols.RECIPES`.
        seeds: Every cell is run once per seed. Tables that average over tasks use only the first seed.
        only: Rows, columns and cells to run, as ``ROW``, ``/COLUMN`` or ``ROW/COLUMN``; empty: all.
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
    run: Run | FewShotTest | None
    """The job of the cell, without the paths of the models that it reads. None: the cell only evaluates the teacher."""
    teacher: Run | None
    meta: MetaRun | None = None
    """Meta-training of the teacher before a few-shot test; None if there is none."""
    start: Run | None = None
    """The training of the model from which the students of few-shot tasks start; None if there is none."""

    @property
    def name(self) -> str:
        """The name of the cell, as in ``--only``, with its seed."""
        return f"{self.row.name}/{self.column.name} seed {self.seed}"


def cells(table: Table, choice: Choice) -> list[Cell]:
    """Return all cells of a table, row by row. ``choice.only`` is ignored."""
    return [
        _few_shot_cell(table, row, column, seed, choice)
        if isinstance(row, FewShotRow)
        else _cell(table, row, column, seed, choice)
        for row in table.rows
        for column in table.columns
        for seed in (choice.seeds if table.mean_over == "seeds" else choice.seeds[:1])
        if row.columns is None or column.name in row.columns
    ]


def chosen(table: Table, every: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """Return the cells that ``only`` names.

    Args:
        table: The table.
        every: All of its cells.
        only: As in :class:`Choice`.

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
            for cell in every
            if row in ("", cell.row.name) and column in ("", cell.column.name)
        }
        if not matching:
            raise RunError(f"'{row}' has no cell in column '{column}'; it has: {', '.join(rows[row].columns or ())}")
        wanted |= matching
    return [cell for cell in every if not only or (cell.row.name, cell.column.name) in wanted]


def _cell(table: Table, row: Row, column: Column, seed: int, choice: Choice) -> Cell:
    protocol, scale = PROTOCOLS[column.protocol], SCALES[choice.scale]
    data, recipe = protocol.data[choice.scale], RECIPES[choice.recipe]
    shared: dict[str, Any] = {**recipe.fields, "image_size": data.image_size, "val": 0.0, **_where(choice)}
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
            views=data.views,
            seed=seed,
        )
    paper = row.paper[table.columns.index(column)]
    return Cell(row, column, seed, paper, student, run, None if row.method == "vanilla" else teacher)


def _few_shot_cell(table: Table, row: FewShotRow, column: Column, seed: int, choice: Choice) -> Cell:
    data, recipe = FEW_SHOT[column.protocol].data[choice.scale], RECIPES[choice.recipe]
    where = _where(choice)

    def backbone(network: str) -> Run:
        return Run(
            **{**recipe.fields, "epochs": data.epochs or recipe.teacher_epochs},
            task=data.seen,
            student=SCALES[choice.scale].network(network),
            val=0.0,
            **where,
        )

    assert row.method is not None
    assert column.shots is not None
    meta = None
    if row.method in list_meta_learners():
        meta = MetaRun(
            data=data.pool,
            method=row.method,
            n_way=data.ways,
            n_shot=min(column.shots, data.meta_shots),
            n_episodes=data.meta_tasks,
            lr=data.meta_lr,
            validate_every=max(1, data.meta_tasks // 5),
            n_validation=data.tune_tasks,
            **where,
        )
    run = FewShotRun(
        data=data.pool,
        method=row.method,
        settings={**row.settings, **({"steps": data.steps} if row.trains else {})},
        n_way=data.ways,
        n_shot=column.shots,
        n_episodes=data.costly_tasks if row.costly else data.tasks,
        seed=seed,
        **where,
    )
    trials = data.costly_trials if row.costly else data.trials
    searched = bool(row.search) and trials > 0
    return Cell(
        row,
        column,
        seed,
        row.paper[table.columns.index(column)],
        SCALES[choice.scale].network(column.student),
        FewShotTest(run, row.search, trials, data.tune_tasks) if searched else FewShotTest(run),
        backbone(row.backbone),
        meta,
        backbone(column.student) if row.trains == "student" else None,
    )


def _where(choice: Choice) -> dict[str, Any]:
    return {"threads": 1, "data_root": choice.data_root, "device": choice.device}


def _epochs(row: Row, data: Data, recipe: PaperRecipe) -> int:
    return max(1, round(row.epochs * (data.epochs or recipe.fields["epochs"])))


def _settings(row: Row, protocol: Protocol, data: Data, recipe: PaperRecipe) -> dict[str, Any]:
    epochs = _epochs(row, data, recipe)
    own = {**{name: round(share * epochs) for name, share in row.shares.items()}, **row.settings}
    if row.method != "refilled":
        return own
    of_the_protocol = {
        "temperature": protocol.temperature,
        "kd_temperature": protocol.temperature,
        "kd_weight": protocol.kd_weight,
        # With fewer epochs the weight decays as far over a stage as in the paper.
        "kd_decay": _DECAY_OF_THE_PAPER * _EPOCHS_OF_THE_PAPER / epochs,
    }
    return {**of_the_protocol, **own}


class JobGraph:
    """The jobs that some cells need, and which jobs must finish before a job can start.

    Args:
        cells: Cells of one table or of several.
        folder: The parent of the jobs' folders. The name of a job is the name of its folder.
    """

    def __init__(self, cells: Sequence[Cell], folder: Path) -> None:
        self.folder = folder
        self.runs: dict[str, Job] = {}
        self.needs: dict[str, tuple[str, ...]] = {}
        """By name of a job, the names of the jobs whose models it reads."""
        self.problems: dict[Cell, RefilledError] = {}
        """Cells whose jobs are invalid, with the reason."""
        self._names: dict[Cell, tuple[str, str | None]] = {}  # names of a cell's job and of its teacher's
        for cell in cells:
            try:
                self._names[cell] = self._add(cell)
            except RefilledError as error:
                self.problems[cell] = error

    def run_of(self, cell: Cell) -> str | None:
        """Return the name of a cell's job: the student's, or the teacher's if there is no student."""
        return None if cell in self.problems else self._names[cell][0]

    def teacher_of(self, cell: Cell) -> str | None:
        """Return the name of the run of a cell's teacher."""
        return None if cell in self.problems else self._names[cell][1]

    def alone(self, run: Run) -> str | None:
        """Return the name of the run that trains the same student alike without a teacher; None without such a run."""
        if run.student is None or run.teacher is None:
            return None
        name = name_of(replace(run, teacher=None, method="vanilla", settings={}))
        return name if name in self.runs else None

    def result(self, name: str | None) -> JobResult | None:
        """Return the result of a job, or None if it is not finished."""
        if name is None or not (self.folder / name / "DONE").exists():
            return None
        return load(self.runs[name], self.folder / name)

    def missing(self, cells: Iterable[Cell]) -> dict[str, Job]:
        """Return the unfinished jobs of some cells, each after the jobs that it needs."""
        final = [name for cell in cells if (name := self.run_of(cell))]
        names = dict.fromkeys(needed for name in final for needed in self._with_needs(name))
        return {name: self.runs[name] for name in names if self.result(name) is None}

    def _with_needs(self, name: str) -> list[str]:
        return [before for need in self.needs.get(name, ()) for before in self._with_needs(need)] + [name]

    def _add(self, cell: Cell) -> tuple[str, str | None]:
        teacher = None if cell.teacher is None else self._add_job(cell.teacher)
        match cell.run:
            case None:
                assert teacher is not None  # every cell has a student or a teacher
                return teacher, teacher
            case Run():
                run = cell.run if load_method(cell.run.method).takes_student else replace(cell.run, student=None)
                return self._add_job(run, teacher=teacher), teacher
            case FewShotTest():
                start = None if cell.start is None else self._add_job(cell.start)
                model = teacher if cell.meta is None else self._add_job(cell.meta, start=teacher)
                return self._add_job(cell.run, teacher=model, student=start), teacher

    def _add_job(self, job: Job, **models: str | None) -> str:
        """Add a job. ``models`` maps its fields to the names of the jobs that make the models it reads."""
        needed: dict[str, Any] = {at: name for at, name in models.items() if name is not None}
        name = name_of(replace(job, **needed))
        if name not in self.runs:
            if isinstance(job, Run):
                self._refuse_outdated(name, job)
                if (self.folder / name / "DONE").exists():
                    refuse_other_images(RunFolder(self.folder / name), with_absolute_paths(job))
            paths: dict[str, Any] = {at: str(self.folder / other) for at, other in needed.items()}
            self.runs[name] = replace(job, **paths)
            if needed:
                self.needs[name] = tuple(dict.fromkeys(needed.values()))
        return name

    def _refuse_outdated(self, name: str, run: Run) -> None:
        """Refuse a folder whose run used different defaults; the folder's name encodes only non-default settings."""
        path = self.folder / name / "run.toml"
        if not path.exists():
            return
        settled = replace(run, settings=load_method(run.method).settle(run.settings))
        if _in_full(read_toml(path)) != _in_full(tomllib.loads(settled.to_toml())):
            raise RunError(f"{path.parent} was run with other default settings; remove it, or choose another --out")


def _in_full(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe and the method's settings from a recorded run, without what depends on the machine."""
    recorded = {**YOUNGER, **record}
    recipe = [field.name for field in fields(Recipe) if field.name != "precision"]
    return {name: recorded.get(name) for name in ("settings", *recipe)}
