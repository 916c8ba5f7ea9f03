"""The paper's tables: what they hold, that each of them runs, and that no number stands where nothing was run."""

import csv
import io
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from scipy.stats import spearmanr
from sklearn.datasets import make_blobs
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.config import MetaRun, Run
from refilled.cost import grid as module
from refilled.cost.few_shot import meta_tasks_per_second, tasks_per_second
from refilled.cost.grid import estimate
from refilled.cost.speed import Work, images_per_second
from refilled.data import TaskSize
from refilled.errors import InUseError, RunError
from refilled.fewshot.evaluation import FewShotResult
from refilled.grid.jobs import FewShotTest, carry_out, name_of
from refilled.grid.runner import run_grid
from refilled.models import create_model
from refilled.paper.cells import Cell, Choice, JobGraph, cells, chosen
from refilled.paper.fill import estimate_table, fill, find_table
from refilled.paper.measures import added_gradients
from refilled.paper.protocols import FEW_SHOT, PROTOCOLS, RECIPES, SCALES
from refilled.paper.rendering import markdown, terminal, write
from refilled.paper.report import Entry, TableReport
from refilled.paper.schema import Column, Row, Table
from refilled.paper.tables import TABLES
from refilled.runs.experiment import distill
from refilled.runs.images import ImageRecord
from refilled.runs.prepared import resolve
from refilled.runs.result import Result
from refilled.runs.teacher_caches import build_cache
from refilled.training.checkpoints import hold
from refilled.training.evaluation import nmi
from refilled.training.progress import duration

ONE = Choice(seeds=(0,))
STUDENT, REFILLED = (
    next(row for row in TABLES["figure3"].rows if row.name == name) for name in ("Student", "ReFilled")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which the runs of all tables have been carried out, those that they share once."""
    folder = tmp_path_factory.mktemp("reproduce")
    every = [cell for table in TABLES.values() for cell in cells(table, ONE)]
    graph = JobGraph(every, folder / "runs")
    run_grid(graph.runs, graph.folder, needs=graph.needs)
    return folder


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))


def small_table(*rows: Row, columns: int = 1) -> Table:
    return Table("small", "A small table", tuple(Column(str(n), "cifar100", "wrn_16_1") for n in range(columns)), rows)


# What the tables hold


@pytest.mark.parametrize(
    ("table", "row", "column", "number"),
    [
        ("table1", "LR", "1", 53.82),
        ("table1", "RKD", "0.75", 68.80),
        ("table2", "KD+VID-I", "(16, 2)", 73.69),
        ("table2", "ReFilled", "(16, 1)", 67.56),
        ("table3", "NST", "0.75", 77.05),
        ("table4", "after alignment", "(40, 1)", 57.62),
        ("table5", "KD", "(16, 2)", 73.57),
        ("table6", "ReFilled", "0.25", 63.15),
        ("s1", "stage 1 + CE", "easy 0.5", 70.15),
        ("s1", "Fine-tune", "easy 1", 66.94),
        ("s1", "stage 1 + LKD, fixed weight", "hard 0.25", 66.42),
        ("s2", "RKD", "0.5", 75.24),
        ("s4", "ReFilled, one stage, 0.2", "0.25", 66.85),
        ("s5", "ReFilled, one stage, 0.1", "(40, 1)", 72.30),
        ("figure3", "stage 1 + CE", "all", 71.90),
        ("figure4", "without alignment", "(16, 1)", 51.77),
        ("table7", "FEAT", "10-shot", 74.86),
        ("table7", "ReFilled from ResNet", "30-shot", 80.33),
        ("s3", "MAML", "5-shot", 63.11),
        ("s3", "ReFilled from ConvNet", "1-shot", 53.44),
    ],
)
def test_numbers_are_those_that_the_paper_prints(table, row, column, number):
    (cell,) = [c for c in cells(TABLES[table], ONE) if (c.row.name, c.column.name) == (row, column)]
    assert cell.paper == number


def test_numbers_that_the_paper_prints_twice_stand_here_twice():
    def numbers(table: str, prefix: str = "") -> dict[tuple[str, str], float | None]:
        found = [cell for cell in cells(TABLES[table], ONE) if cell.paper is not None]
        return {
            (c.row.name, c.column.name.removeprefix(prefix)): c.paper for c in found if c.column.name.startswith(prefix)
        }

    assert numbers("table1").items() <= numbers("s4").items()
    assert numbers("table1").items() <= numbers("s1", "hard ").items()
    printed = {cell for cell in numbers("table2").items() if cell[1] is not None}
    assert printed <= numbers("s5").items()
    assert numbers("table7").items() <= numbers("s3").items() == numbers("s3-imagenet").items()
    hard, left = numbers("s1", "hard "), numbers("figure3")
    for name in ("Student", "RKD", "stage 1 + CE", "stage 1 + LKD, fixed weight", "ReFilled"):
        assert left[name, "all"] == hard[name, "1"]


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_a_table_is_whole(table):
    for names in ([row.name for row in table.rows], [column.name for column in table.columns]):
        assert len(set(names)) == len(names)
    for row in table.rows:
        assert len(row.paper) == len(table.columns)
        assert set(row.columns or ()) <= {column.name for column in table.columns}


def test_at_the_papers_scale_a_run_is_what_the_paper_says():
    (cell,) = [
        cell
        for cell in cells(TABLES["table2"], Choice(scale="paper", seeds=(1,)))
        if (cell.row.name, cell.column.name) == ("ReFilled", "(16, 2)")
    ]
    run, teacher = cell.run, cell.teacher
    assert (run.task, run.student, run.epochs, run.batch_size, run.seed) == ("cifar100", "wrn_16_2", 400, 128, 1)
    assert (run.lr, run.momentum, run.nesterov, run.schedule, run.warmup, run.val) == (0.1, 0.9, False, "step", 0, 0)
    settings = run.settings
    assert (settings["temperature"], settings["kd_weight"]) == (4, 20)
    assert settings["kd_decay"] == pytest.approx(0.05)
    assert (teacher.task, teacher.student, teacher.epochs, teacher.seed) == ("cifar100", "wrn_40_2", 200, 0)

    (cell,) = [
        cell
        for cell in cells(TABLES["s1"], Choice(scale="paper", seeds=(0,)))
        if (cell.row.name, cell.column.name) == ("Fine-tune", "easy 1")
    ]
    assert (cell.run.epochs, cell.run.lr, cell.run.image_size) == (50, 1e-4, 224)
    assert (cell.teacher.task, cell.run.task) == ("cub:random-half@test=0.3", "cub:other-half@test=0.3")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("scale", SCALES)
def test_all_methods_train_their_students_for_equally_many_epochs(scale, recipe):
    for table in TABLES.values():
        found = cells(table, Choice(scale, recipe))
        assert len({c.run.epochs for c in found if c.run and c.row.epochs == 1 and c.column.protocol == "cub"}) <= 1
        for cell in found:
            if isinstance(cell.run, Run) and cell.run.method == "refilled" and "kd_decay" not in cell.row.settings:
                # In a stage of any length the weight falls as far as in the paper's 200 epochs.
                assert cell.run.settings["kd_decay"] * cell.run.epochs / 2 == pytest.approx(0.05 * 200)
            if isinstance(cell.run, Run) and cell.run.method == "dkd":
                # It warms up for the share of the epochs that its authors' 20 of 240 are.
                assert cell.run.settings["warmup_epochs"] == round(cell.run.epochs / 12)


def test_at_mini_scale_a_teacher_looks_once_and_no_student_sees_a_view_twice():
    for table in TABLES.values():
        for cell in cells(table, Choice("mini")):
            if isinstance(cell.run, Run) and cell.row.method != "fine_tune" and cell.row.epochs == 1:
                assert cell.run.views == cell.run.epochs


def test_every_protocol_has_data_at_every_scale_and_every_column_a_protocol():
    for protocol in (*PROTOCOLS.values(), *FEW_SHOT.values()):
        assert set(protocol.data) == set(SCALES)
    named = {column.protocol for table in TABLES.values() for column in table.columns}
    assert named == {*PROTOCOLS, *FEW_SHOT}


# Few-shot tables


def few_shot_cell(scale: str, row: str, column: str, table: str = "s3") -> Cell:
    found = cells(TABLES[table], Choice(scale))
    (cell,) = [cell for cell in found if (cell.row.name, cell.column.name) == (row, column)]  # whatever the seeds
    return cell


def test_at_the_papers_scale_few_shot_tests_are_what_the_paper_says():
    cell = few_shot_cell("paper", "SVM", "30-shot")
    run = cell.run.run
    assert (run.data, run.n_way, run.n_shot, run.n_query, run.n_episodes) == ("mini_imagenet", 5, 30, 15, 600)
    teacher = cell.teacher
    assert (teacher.task, teacher.student, teacher.batch_size) == ("mini_imagenet:seen", "convnet4", 128)
    assert cell.run.search
    cell = few_shot_cell("paper", "ReFilled from ResNet", "10-shot")
    assert (cell.teacher.student, cell.start.student, cell.run.run.n_episodes) == ("resnet12", "convnet4", 600)
    cell = few_shot_cell("paper", "FEAT", "10-shot")
    assert (cell.meta.method, cell.meta.n_shot, cell.meta.n_way, cell.start) == ("feat", 10, 5, None)


def test_a_split_among_the_options_of_a_task_stays_there():
    cell = few_shot_cell("mini", "1NN", "1-shot", "s3-imagenet")
    assert cell.teacher.task == "tinyimagenet64:seen@split=tiny_imagenet"


def test_few_shot_tests_share_backbones_and_meta_training(tmp_path):
    found = {name: cells(TABLES[name], Choice("mini")) for name in ("s3", "table7")}
    graph = JobGraph([*found["s3"], *found["table7"]], tmp_path)
    kinds = [type(job) for job in graph.runs.values()]
    shots_of_meta_training = 2
    assert (kinds.count(Run), kinds.count(MetaRun)) == (2, 3 * shots_of_meta_training)
    assert kinds.count(FewShotTest) == len(found["s3"])
    for cell in found["s3"]:
        name = graph.run_of(cell)
        before = list(graph.missing([cell]))
        assert before[-1] == name
        for needed in graph.needs[name]:
            assert before.index(needed) < before.index(name)
        job = graph.runs[name]
        models = {model for model in (job.teacher, job.student) if model is not None}
        assert models == {str(tmp_path / needed) for needed in graph.needs[name]}


def test_a_few_shot_test_is_named_after_all_that_decides_it():
    job = few_shot_cell("mini", "SVM", "5-shot").run
    run = job.run
    assert name_of(job) == name_of(replace(job, run=replace(run, device="cuda", threads=4, settings={"c": 1.0})))
    others = [
        replace(job, teacher="another"),
        replace(job, student="another"),
        replace(job, trials=7),
        replace(job, search={"c": "1..2"}),
        *(replace(job, run=replace(run, **change)) for change in ({"n_shot": 1}, {"seed": 1}, {"settings": {"c": 2}})),
    ]
    assert len({name_of(job), *map(name_of, others)}) == 1 + len(others)


@pytest.mark.slow
def test_a_few_shot_table_shows_the_interval_over_tasks(folder):
    page = fill(TABLES["table7"], Choice(), folder, console=quiet()).page
    rows = read_csv(page.parent / "results.csv")
    assert {row["seed"] for row in rows} == {"0"}, "tasks take the place of seeds"
    for row in rows:
        found = FewShotResult.load(folder / "runs" / row["run"])
        assert (row["value"], row["interval"]) == (f"{found.accuracy:.2f}", f"{found.interval:.2f}")
        assert int(row["tasks"]) == found.n_episodes
        assert f"{found.accuracy:.2f} ± {found.interval:.2f}" in page.read_text()
    assert "mean over 4 or 2 tasks ± its 95 % interval" in page.read_text()
    assert "digits:unseen" in page.read_text()


@pytest.mark.slow
def test_settings_that_were_searched_for_are_those_of_the_test(folder):
    (cell,) = [c for c in cells(TABLES["table7"], ONE) if (c.row.name, c.column.name) == ("SVM", "10-shot")]
    name = JobGraph([cell], folder / "runs").run_of(cell)
    written = tomllib.loads((folder / "runs" / name / "run.toml").read_text())
    tried = optuna_values(folder / "runs" / f"{name}.tuning" / "trials")
    assert len(tried) == cell.run.trials
    assert written["settings"]["c"] in [pytest.approx(value) for value in tried]
    assert written["side"] == "unseen"


def optuna_values(journal: Path) -> list[float]:
    optuna = pytest.importorskip("optuna")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    (study,) = optuna.get_all_study_summaries(storage)
    return [trial.params["c"] for trial in optuna.load_study(study_name=study.study_name, storage=storage).trials]


def test_one_process_at_a_time_searches(tmp_path):
    job = few_shot_cell("smoke", "SVM", "1-shot").run
    (tmp_path / "test.tuning").mkdir()
    with hold(tmp_path / "test.tuning"), pytest.raises(InUseError):
        carry_out(job, tmp_path / "test")


def test_few_shot_tests_and_meta_trainings_are_estimated_too(tmp_path, monkeypatch):
    every = [few_shot_cell("smoke", *names) for names in (("FEAT", "1-shot"), ("SVM", "1-shot"), ("MAML", "5-shot"))]
    every.append(few_shot_cell("smoke", "ReFilled from ResNet", "5-shot"))
    graph = JobGraph(every, tmp_path)
    missing = graph.missing(every)
    monkeypatch.setattr(module, "images_per_second", lambda work, device: 1e9)
    monkeypatch.setattr(module, "tasks_per_second", lambda run, network, student, size: 0.1 if student else 1.0)
    monkeypatch.setattr(module, "meta_tasks_per_second", lambda run, network, size: 0.5)
    first, *lines = estimate(graph, missing, jobs=2)
    tests = [job for job in missing.values() if isinstance(job, FewShotTest)]
    seconds = sum((10 if job.student else 1) * (job.run.n_episodes + job.trials * job.tune_tasks) for job in tests)
    seconds += sum(2 * job.n_episodes for job in missing.values() if isinstance(job, MetaRun))
    assert first == f"{len(missing)} runs to do, about {duration(seconds / 2)} in 2 processes:"
    assert sum(int(line.split()[0]) for line in lines) == len(missing)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["1NN", "SVM", "LR", "Fine-Tune", "MAML", "ProtoNet", "FEAT", "RKD from ResNet", "ReFilled from ResNet"]
)
def test_every_few_shot_row_can_be_timed(name):
    cell = few_shot_cell("smoke", name, "5-shot")
    student = "convnet4" if cell.start else None
    assert tasks_per_second(cell.run.run, "convnet4", student, image_size=16) > 0
    if cell.meta:
        assert meta_tasks_per_second(cell.meta, "convnet4", image_size=16) > 0


# From cells to runs


def test_a_run_is_named_after_what_it_is_and_not_after_where_it_is():
    run = Run(task="digits", student="timm/resnet18", method="refilled")
    assert name_of(run) == name_of(replace(run, device="cuda", threads=4, data_root="/elsewhere"))
    assert name_of(run) == name_of(replace(run, settings={"temperature": 2.0}))  # which is the default
    others = [replace(run, seed=1), replace(run, lr=0.2), replace(run, settings={"gamma": 0.1}), replace(run, shots=5)]
    assert len({name_of(run), *map(name_of, others)}) == 5
    assert "/" not in name_of(run)


@pytest.mark.parametrize("then", ["angle_weight = 10.0\n", ""], ids=["another default", "before the parameter came"])
def test_a_run_of_an_earlier_version_is_refused(tmp_path, then):
    table = small_table(Row("taught", "rkd", (None,)))
    graph = JobGraph(cells(table, ONE), tmp_path)
    (name,) = graph.needs
    (tmp_path / name).mkdir()
    written = tmp_path / name / "run.toml"
    settled = resolve(graph.runs[name])
    written.write_text(settled.to_toml())
    assert not JobGraph(cells(table, ONE), tmp_path).problems
    written.write_text(settled.to_toml().replace("angle_weight = 50.0\n", then))
    (problem,) = JobGraph(cells(table, ONE), tmp_path).problems.values()
    assert f"{name} was run with other default settings" in str(problem)


@pytest.mark.slow
def test_a_finished_run_of_other_images_is_refused(tmp_path):
    (cell,) = cells(small_table(STUDENT), ONE)
    graph = JobGraph([cell], tmp_path)
    run_grid(graph.runs, tmp_path)
    assert not JobGraph([cell], tmp_path).problems
    record = ImageRecord.load(folder := tmp_path / graph.run_of(cell))
    others = {**record.digests, "train": record.digests["train"] + 1}  # what it would be, had it seen other images
    replace(record, fingerprint="0" * 64, stamp="earlier", digests=others).save(folder)
    (problem,) = JobGraph([cell], tmp_path).problems.values()
    assert re.search(rf"{folder.name} was started with: \d+ of train are new", str(problem))


def test_a_dry_run_says_what_cannot_be_done(tmp_path):
    table = small_table(Row("taught", "rkd", (None,)))
    graph = JobGraph(cells(table, ONE), tmp_path / "runs")
    (name,) = graph.needs
    (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / name / "run.toml").write_text(resolve(graph.runs[name]).to_toml().replace("50.0", "10.0"))
    (line,) = estimate_table(table, ONE, tmp_path)
    assert re.fullmatch(f"failed: taught.*{name} was run with other default settings.*", line)


def test_teachers_and_equal_cells_are_one_run(tmp_path):
    tables = [TABLES[name] for name in ("table1", "s4", "s1", "figure3")]
    choice = Choice(scale="paper", seeds=(0, 1))
    graph = JobGraph([cell for table in tables for cell in cells(table, choice)], tmp_path)
    teachers = {needed for name, needed in graph.needs.items() if graph.runs[name].task == "cub:100-199@test=0.3"}
    assert len(teachers) == 1
    students = [run for run in graph.runs.values() if run.method == "vanilla" and run.task == "cub:100-199@test=0.3"]
    widths, seeds, shots = 4, 2, 6
    assert len(students) == widths * seeds + shots * seeds


def test_only_names_rows_columns_and_cells():
    table = TABLES["table2"]
    every = cells(table, ONE)

    def names(*only: str) -> list[str]:
        return [cell.name for cell in chosen(table, every, only)]

    assert names("ReFilled/(16, 2)") == ["ReFilled/(16, 2) seed 0"]
    assert len(names("ReFilled")) == len(table.columns)
    assert len(names("/(16, 2)")) == len(table.rows)
    assert len(names("ReFilled", "/(16, 2)")) == len(table.rows) + len(table.columns) - 1
    assert len(names()) == len(every)


@pytest.mark.parametrize(
    ("table", "only", "message"),
    [
        ("table2", "Refilled", "did you mean 'ReFilled'"),
        ("table2", "/(16,2)", "did you mean '\\(16, 2\\)'"),
        ("table1", "1NN/0.5", "'1NN' has no cell in column '0.5'; it has: 1"),
    ],
)
def test_only_what_a_table_has_can_be_named(table, only, message):
    with pytest.raises(RunError, match=message):
        chosen(TABLES[table], cells(TABLES[table], ONE), [only])


@pytest.mark.parametrize(("field", "value"), [("scale", "mimi"), ("recipe", "paper2O20")])
def test_an_unknown_scale_or_recipe_is_refused_with_the_nearest(field, value):
    with pytest.raises(RunError, match=f"unknown {field}.*did you mean"):
        Choice(**{field: value})


# Carrying out


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_every_table_runs(table, folder, capsys):
    runs = sorted((folder / "runs").iterdir())
    outcome = fill(table, ONE, folder, console=Console(width=300))
    assert "nothing is left to do" in capsys.readouterr().out
    assert sorted((folder / "runs").iterdir()) == runs
    assert not outcome.failures
    lines = read_csv(outcome.page.parent / "results.csv")
    expected = cells(table, ONE)
    assert [(line["row"], line["column"]) for line in lines] == [(c.row.name, c.column.name) for c in expected]
    for line, cell in zip(lines, expected, strict=True):
        too_many = (cell.column.classes or 0) > 10  # digits
        assert bool(line["value"]) == (not too_many), line
    assert (outcome.page.parent / "picture.svg").exists() == (table.picture is not None)
    assert table.title.partition(":")[0] in (outcome.page.parent / "results.md").read_text()


@pytest.mark.slow
def test_a_page_says_where_its_figures_come_from(folder):
    page = fill(TABLES["table4"], ONE, folder, console=quiet()).page.read_text()
    for said in (
        "paper2020",
        "smoke",
        "refilled reproduce table4 --scale smoke",
        "the last epoch",
        "wrn_10_1 for",
    ):
        assert said in page
    result = Result.load(next((folder / "runs").glob("wrn_10_1-vanilla-*")))
    assert result.data["fingerprint"][:16] in page
    assert all(f"{name} {value}" in page for name, value in result.hardware.items())
    assert not re.search(r"<script|https?://", page)


@pytest.mark.slow
def test_values_agree_with_the_runs_that_they_come_from(folder):
    page = fill(TABLES["figure3"], ONE, folder, console=quiet()).page
    for line in read_csv(page.parent / "results.csv"):
        assert line["value"] == f"{Result.load(folder / 'runs' / line['run']).accuracy:.2f}"


@pytest.mark.slow
def test_a_failed_cell_shows_no_number_and_leaves_the_others_alone(tmp_path, capsys):
    failing = tmp_path / "failing.py"
    failing.write_text("def failing(student, teacher):\n    raise RuntimeError('out of luck')\n")
    rows = (
        Row("unknown", "no_such_method", (70.0,)),
        Row("raises", str(failing), (71.0,)),
        Row("alone", "vanilla", (72.0,)),
    )
    outcome = fill(small_table(*rows), ONE, tmp_path, console=Console(width=300))
    assert set(outcome.failures) == {"unknown/0 seed 0", "raises/0 seed 0"}
    assert (
        "did you mean" in outcome.failures["unknown/0 seed 0"]
        or "unknown method" in outcome.failures["unknown/0 seed 0"]
    )
    assert outcome.failures["raises/0 seed 0"].endswith("failing.py:2: RuntimeError: out of luck")
    lines = {line["row"]: line for line in read_csv(outcome.page.parent / "results.csv")}
    # A cell without a run of its own is not to be filled from its teacher's, which is finished.
    assert [lines[row]["value"] for row in ("unknown", "raises")] == ["", ""]
    assert float(lines["alone"]["value"]) > 0
    assert "out of luck" in outcome.page.read_text()
    assert f"raises/0 seed 0: {outcome.failures['raises/0 seed 0']}" in capsys.readouterr().out


@pytest.mark.slow
def test_students_of_a_teacher_that_fails_fail_with_that_reason(tmp_path):
    failing = tmp_path / "failing.py"
    failing.write_text("def failing(student, teacher):\n    raise RuntimeError('out of luck')\n")
    shared = {"task": "digits@shots=2", "student": "wrn_10_1", "epochs": 1, "threads": 1, "val": 0.0}
    runs = {
        "teacher": Run(**shared, method=str(failing)),
        "student": Run(**shared, method="rkd", teacher=str(tmp_path / "teacher")),
        "alone": Run(**shared),
    }
    failures = {}
    results = run_grid(
        runs,
        tmp_path,
        on_failure=lambda name, error: failures.update({name: str(error)}),
        needs={"student": ["teacher"]},
    )
    assert failures == {
        "teacher": f"{failing}:2: RuntimeError: out of luck",
        "student": "it needs teacher, which failed",
    }
    assert list(results) == ["alone"]


@pytest.mark.slow
def test_two_schedulers_on_one_folder_run_nothing_twice_and_both_get_all_results(tmp_path):
    (tmp_path / "counted.py").write_text(
        "import os\nfrom refilled.methods.vanilla import vanilla\n\n"
        "def counted(student, teacher):\n"
        f"    with open({str(tmp_path / 'begun')!r}, 'a') as file:\n"
        "        file.write(f'{os.getppid()}\\n')\n"
        "    return vanilla(student, teacher)\n"
    )
    (tmp_path / "schedule.py").write_text(
        "import sys\nfrom pathlib import Path\n"
        "from refilled.grid.runner import run_grid\nfrom refilled.config import Run\n\n"
        "if __name__ == '__main__':\n"
        "    shared = dict(task='digits@shots=4', student='wrn_10_1', epochs=3, val=0.0, threads=1)\n"
        "    runs = {f'run{n}': Run(**shared, seed=n, method=sys.argv[1]) for n in range(6)}\n"
        "    found = run_grid(runs, Path(sys.argv[2]))\n"
        "    print(*(f'{name}={result.accuracy}' for name, result in found.items()))\n"
    )
    command = [sys.executable, "-W", "ignore", "schedule.py", "counted.py", "runs"]
    schedulers = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    try:
        answers = [scheduler.communicate(timeout=600)[0] for scheduler in schedulers]
    finally:
        for scheduler in schedulers:
            scheduler.kill()
    assert [scheduler.returncode for scheduler in schedulers] == [0, 0]
    assert answers[0] == answers[1]
    assert answers[0].count("=") == 6
    assert len((tmp_path / "begun").read_text().split()) == 6


@pytest.mark.slow
def test_each_training_run_leaves_a_report_against_the_student_alone(tmp_path, in_process):
    table = small_table(Row("alone", "vanilla", (None,)), Row("taught", "regression", (None,)))
    both = cells(table, ONE)
    graph = JobGraph(both, tmp_path / "runs")
    alone, taught = map(graph.run_of, both)
    assert graph.alone(graph.runs[taught]) == alone
    assert graph.alone(graph.runs[alone]) is None
    fill(table, ONE, tmp_path, console=quiet(), executor=in_process)
    pages = {path.parent.name: path.read_text() for path in (tmp_path / "runs").glob("*/report.html")}
    assert pages.keys() == graph.runs.keys()  # with the teacher
    assert f"and {alone} {Result.load(tmp_path / 'runs' / alone).accuracy:.2f} %" in pages[taught]
    assert "Classes that gained and lost" not in pages[alone]


@pytest.mark.slow
def test_a_table_goes_to_the_executor_that_it_is_given(tmp_path, in_process):
    table = small_table(Row("alone", "vanilla", (None,)))
    outcome = fill(table, ONE, tmp_path, 2, quiet(), in_process, reports=False)
    assert not list(tmp_path.rglob("runs/*/report.html"))
    assert outcome.failures == {}
    assert in_process.jobs == [2]
    assert len(in_process.calls) == 1


# What is said beforehand


def test_the_estimate_adds_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "images_per_second", lambda work, device: 100.0 if work.teacher else 200.0)
    monkeypatch.setattr(module, "_size", lambda *task: TaskSize(("a", "b"), 6000, 0, 0, 32, "none", 1000.0))
    rows = [Row(method, method, (None,)) for method in ("vanilla", "kd", "at")]
    choice = Choice("mini", seeds=(0, 1))
    every = cells(small_table(*rows), choice)
    graph = JobGraph(every, tmp_path)
    missing = graph.missing(every)
    epochs = 24
    # Two students alone and their teacher; what it says of as many views, once for two students; two who look at its
    # feature maps, and so need it itself.
    expected = (3 * 6000 * epochs / 200 + 3 * 6000 * epochs / 200 + 2 * 6000 * epochs / 100) / 3600 / 2
    lines = estimate(graph, missing, jobs=2)
    assert lines[0] == f"7 runs to do, about {60 * expected:.1f} minutes in 2 processes:"
    assert [re.match(r"  (\d x \S+ [\w ]+),", line)[1] for line in lines[1:]] == [
        "4 x wrn_10_1 alone", "1 x wrn_16_2 alone", "1 x wrn_16_2 embedding", "2 x wrn_10_1 taught by wrn_16_2",
    ]  # fmt: skip
    assert estimate(graph, {}, jobs=2) == ["nothing is left to do"]


@pytest.mark.slow
def test_embeddings_that_lie_on_disk_are_not_counted_again(tmp_path, monkeypatch):
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    run = Run(task="digits:5-9", student="wrn_10_1", teacher=str(tmp_path / "t"), shots=5, views=4, threads=1)
    assert module.left_to_embed(run) == 1  # there is no teacher yet
    distill(replace(run, task="digits:0-4", teacher=None, views=None, epochs=1), tmp_path / "t")
    assert module.left_to_embed(run) == 1
    build_cache(run, shards=[0])
    assert module.left_to_embed(run) == 3 / 4
    build_cache(run)
    assert module.left_to_embed(run) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "work",
    [
        Work("mobilenet_0.25", "resnet110", 32, 4),
        Work("mobilenet_1", "timm/resnet34", 224, 2),
        Work("wrn_16_1", "wrn_40_2", 32, 4),
    ],
    ids=str,
)
def test_the_papers_pairs_of_networks_train(work):
    before = torch.get_num_threads()
    assert 0 < images_per_second(work, "cpu") < 1e6
    assert torch.get_num_threads() == before


def test_missing_data_are_reported_before_anything_trains(tmp_path):
    with pytest.raises(Exception, match="CUB-200-2011 is not in"):
        fill(TABLES["table1"], Choice("paper", data_root=str(tmp_path)), tmp_path / "out", console=quiet())
    assert not (tmp_path / "out" / "runs").exists()


# What is said afterwards


def report(table: Table, values: dict[tuple[str, int], float], seeds: tuple[int, ...] = (0,)) -> TableReport:
    found = cells(table, replace(ONE, seeds=seeds))
    entries = [Entry(cell, None, values.get((cell.row.name, cell.seed))) for cell in found]
    return TableReport(table, replace(ONE, seeds=seeds), entries, {}, {}, ["refilled"])


def test_ours_stand_beside_the_papers():
    table = small_table(Row("a", "vanilla", (70.0,)), Row("b", "vanilla", (None,)))
    said = report(table, {("a", 0): 71.0, ("a", 1): 73.0, ("b", 0): 5.0}, seeds=(0, 1))
    (column,) = table.columns
    assert str(said.shown(table.rows[0], column)) == "72.00 ± 1.41 (70.00, +2.00)"
    assert str(said.shown(table.rows[1], column)) == "5.00, 1 of 2 seeds"
    assert str(report(table, {}).shown(table.rows[0], column)) == "not run (70.00)"


@pytest.mark.parametrize("ours", [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [2.0, 1.0, 4.0, 3.0]])
def test_the_order_of_rows_is_compared_with_the_papers(ours):
    papers = [60.0, 61.0, 62.5, 70.0]
    table = small_table(*(Row(str(n), "vanilla", (paper,)) for n, paper in enumerate(papers)))
    said = report(table, {(str(n), 0): value for n, value in enumerate(ours)})
    assert said.ranks() == [f"{spearmanr(ours, papers).statistic:+.2f}"]
    (order,) = said.orders()
    assert order.papers == ["3", "2", "1", "0"]
    assert order.ours == [str(n) for n in sorted(range(4), key=lambda n: -ours[n])]


def test_rows_are_set_against_the_student_alone_seed_by_seed(tmp_path):
    table = small_table(
        *(Row(name, method, (None,)) for name, method in (("alone", "vanilla"), ("a", "kd"), ("b", "at")))
    )
    values = {("alone", 0): 1.0, ("alone", 1): 5.0, ("a", 0): 2.0, ("a", 1): 6.5, ("b", 1): 4.0}
    said = report(table, values, seeds=(0, 1))
    assert said.gains() == [
        ["", "0"],
        ["a", "+1.25 [-1.93, +4.43], not established"],
        ["b", "-1.00, one seed, not established"],
    ]
    assert "| a | +1.25 [-1.93, +4.43], not established |" in markdown(said)
    assert "+1.25 [-1.93, +4.43]" in write(said, tmp_path).read_text()
    assert report(table, {("a", 0): 1.0}).gains() == []
    assert report(small_table(*table.rows[1:]), values).gains() == []


def test_the_order_of_few_shot_rows_is_that_on_the_tasks_that_all_had(tmp_path):
    table = replace(
        small_table(*(Row(name, "vanilla", (float(n),)) for n, name in enumerate("abc"))), mean_over="tasks"
    )
    tasks = {"a": [10, 20], "b": [30, 20, 0, 0, 0, 0], "c": [30, 40, 0, 0]}  # over all tasks b and c are worse than a
    entries = []
    for cell in cells(table, ONE):
        folder, accuracies = tmp_path / cell.row.name, tasks[cell.row.name]
        folder.mkdir()
        (folder / "tasks.jsonl").write_text("".join(f'{{"accuracy": {number}}}\n' for number in accuracies))
        entries.append(Entry(cell, folder, sum(accuracies) / len(accuracies)))
    assert TableReport(table, ONE, entries, {}, {}, ["refilled"]).ranks() == ["+1.00"]


@pytest.mark.parametrize("values", [{("a", 0): 1.0, ("b", 0): 2.0}, {(name, 0): 1.0 for name in "abc"}, {}])
def test_an_order_that_means_nothing_is_not_reported(values):
    table = small_table(*(Row(name, "vanilla", (float(n),)) for n, name in enumerate("abc")))
    assert report(table, values).ranks() == [""]


def test_names_are_text_wherever_they_are_shown(tmp_path):
    name = "<script>alert(1)</script> {{7*7}} [/b] | $x$"
    table = replace(small_table(Row(name, "vanilla", (1.0,))), picture="lines", columns_are=name)
    said = report(table, {(name, 0): 2.0})
    page = write(said, tmp_path).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; {{7*7}}" in page
    assert (tmp_path / "results.md").read_text().count("|") - 2 * 3 == 3  # the bar in the name is no border
    assert read_csv(tmp_path / "results.csv")[0]["row"] == name
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(terminal(said))
    assert "[/b]" in console.export_text()


# Measures


def test_clusters_that_are_the_classes_give_100_and_noise_nearly_0():
    points, labels = make_blobs([20] * 5, n_features=16, cluster_std=0.05, random_state=0)
    embedding, classes = torch.tensor(points).float(), torch.tensor(labels)
    assert nmi(embedding, classes) == pytest.approx(100)
    assert nmi(embedding * torch.rand(len(classes), 1).add(0.5), classes) == pytest.approx(100)  # lengths do not matter
    noise = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    assert nmi(noise, torch.arange(600) % 4) < 5


def test_the_gradient_that_distillation_adds_is_that_of_a_loop():
    torch.manual_seed(0)
    student, teacher = create_model("wrn_10_1", 3), create_model("wrn_10_1", 5)
    pixels = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    classes, labels, temperature = torch.tensor([0, 2, 4]), torch.tensor([0, 0, 2, 2, 4, 4]), 4.0
    found = added_gradients(student, teacher, pixels, labels, classes, temperature)

    student.train()  # its batch statistics are those of the batch, whatever it has seen before
    teacher.eval()
    with torch.no_grad():
        seen, taught = student(pixels), teacher(pixels)
        p = (seen.logits / temperature).softmax(1)
        q = (taught.logits[:, classes] / temperature).softmax(1)
        kd = temperature * (p - q)  # T² of the loss over T of the logits
        centers = torch.stack([taught.embedding[labels == c].mean(0) for c in classes])
        q = (-(taught.embedding[:, None] - centers).square().sum(2) / temperature).softmax(1)
        local = seen.logits.softmax(1) - q
    for kind, by_logits in (("gradient of kd", kd), ("gradient of local kd", local)):
        rows = [sum(by_logits[i, c] * seen.embedding[i] for i in range(6)) / 6 for c in range(3)]
        assert found[kind] == pytest.approx(sum(row.norm().item() for row in rows) / 3, rel=1e-4)


# The command line


def test_the_command_line_lists_and_refuses(tmp_path):
    listed = CliRunner().invoke(app, ["reproduce", "list"]).output
    assert all(name in listed for name in TABLES)
    with pytest.raises(RunError, match="unknown table 'tabel2'; did you mean 'table2'"):
        find_table("tabel2")


@pytest.mark.slow
def test_the_command_line_estimates_without_running_and_reports_failures(folder, tmp_path):
    result = CliRunner().invoke(app, ["reproduce", "figure4", "--seeds", "1", "--out", str(tmp_path), "--dry-run"])
    assert result.exit_code == 0
    assert "2 runs to do" in result.output
    assert not list(tmp_path.iterdir())
    result = CliRunner().invoke(app, ["reproduce", "figure4", "--seeds", "1", "--out", str(folder)])
    assert (result.exit_code, "page: " in result.output) == (0, True)
