"""Tuning finds the best values on held-out images, uses the test images once, and resumes."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("optuna", reason="Optuna is not installed")

from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.config import Run
from refilled.errors import MethodError, NonFiniteError, RefilledError, RunError
from refilled.runs.experiment import distill
from refilled.runs.result import Result
from refilled.training.checkpoints import hold
from refilled.training.journal import Interrupted
from refilled.training.progress import Display
from refilled.tuning import student as tuning
from refilled.tuning.student import tune

QUICK = Run(task="digits:5-9", student="wrn_10_1", epochs=1, batch_size=20, shots=12, threads=1, precision="32-true")
SEARCH = {"C": "0.001..100:log"}


@pytest.fixture
def probe(teacher) -> Run:
    return replace(QUICK, method="linear_probe", teacher=teacher, val=0.3)


class Trials(list):
    """Trials as they are told: number, values, accuracy."""

    def __call__(self, number, values, accuracy):
        self.append((number, dict(values), accuracy))


@pytest.mark.slow
def test_the_best_choice_is_that_of_trying_each(probe, tmp_path):
    choices = ("0.0001", "1", "100")
    each = {c: distill(replace(probe, score="val", settings={"C": c}), tmp_path / c).accuracy for c in choices}
    tuned = tune(probe, {"C": ",".join(choices)}, 8, tmp_path / "tuned", told := Trials())
    assert all(accuracy == each[values["C"]] for _, values, accuracy in told)
    assert {values["C"] for _, values, _ in told} == set(choices)
    assert tuned.val_accuracy == max(each.values())
    assert each[tuned.values["C"]] == tuned.val_accuracy
    assert len(list((tmp_path / "tuned" / "trials").iterdir())) == len(choices), "what was tried is not tried again"


@pytest.mark.slow
def test_only_the_final_run_sees_the_test_images_and_it_trains_on_all_others(probe, tmp_path):
    tuned = tune(probe, SEARCH, 3, tmp_path / "t")
    results = [Result.load(folder) for folder in (tmp_path / "t" / "trials").iterdir()]
    assert [result.data["scored"] for result in results] == ["val"] * 3
    assert tuned.result == Result.load(tuned.folder)
    assert tuned.result.data["scored"] == "test"
    assert tuned.result.data["images"]["val"] == 0
    again = distill(replace(probe, val=0.0, settings=tuned.values), tmp_path / "again")
    assert again.accuracy == tuned.result.accuracy


@pytest.mark.slow
def test_parameters_of_the_method_and_of_training_are_searched_together(teacher, tmp_path):
    run = replace(QUICK, method="at", teacher=teacher)
    search = {"weight": "10..1000:log", "batch_size": "10..30", "nesterov": "true,false"}
    tuned = tune(run, search, 2, tmp_path / "t", told := Trials())
    for number, values, _ in told:
        trial = Run.from_toml((tmp_path / "t" / "trials" / str(number) / "run.toml").read_text())
        assert trial.settings == {"weight": values["weight"]}
        assert trial.batch_size == values["batch_size"]
        assert trial.nesterov is (values["nesterov"] == "true")
        assert 10 <= trial.settings["weight"] <= 1000
        assert trial.batch_size in range(10, 31)
    assert tuned.val_accuracy == max(accuracy for *_, accuracy in told)


@pytest.mark.slow
def test_an_interrupted_search_continues_as_if_it_had_not_been(probe, tmp_path):
    tune(probe, SEARCH, 4, tmp_path / "whole", whole := Trials())

    class Stopping(Trials):
        def __call__(self, *trial):
            super().__call__(*trial)
            if len(self) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(probe, SEARCH, 4, tmp_path / "parts", first := Stopping())
    tune(probe, SEARCH, 4, tmp_path / "parts", second := Trials())
    assert [*first, *second] == whole
    assert len({values["C"] for _, values, _ in whole}) == 4
    assert len(first) == 2


@pytest.mark.slow
def test_a_finished_search_is_not_repeated(probe, tmp_path):
    found = tune(probe, SEARCH, 2, tmp_path / "t")
    (found.folder / "mark").touch()
    assert tune(probe, SEARCH, 2, tmp_path / "t", again := Trials()) == found
    assert again == []
    assert (found.folder / "mark").exists()


@pytest.mark.slow
def test_more_trials_that_find_better_values_are_trained_on_all_images_too(probe, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_try", lambda study, trial, run, folder: float(trial.number))  # ever better
    first, second = (tune(probe, SEARCH, trials, tmp_path / "t") for trials in (1, 3))
    assert first.values != second.values
    for tuned in (first, second):
        run = Run.from_toml((tuned.folder / "run.toml").read_text())
        assert (run.settings, run.val, run.score) == (tuned.values, 0, "test")
        assert Result.load(tuned.folder) == tuned.result


@pytest.mark.slow
def test_a_trial_stopped_in_the_middle_resumes_where_it_stopped(teacher, tmp_path, monkeypatch):
    run = replace(QUICK, method="at", teacher=teacher, epochs=2)
    begin = tuning.complete

    class Stops(Display):
        def step(self, epoch, images, values):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tuning, "complete", lambda run, folder: begin(run, folder, display=Stops()))
    with pytest.raises(Interrupted):
        tune(run, {"weight": "1..10"}, 2, tmp_path / "t")
    assert (tmp_path / "t" / "trials" / "0" / "last.ckpt").exists()
    monkeypatch.setattr(tuning, "complete", begin)
    tune(run, {"weight": "1..10"}, 2, tmp_path / "t", told := Trials())
    assert [number for number, *_ in told] == [0, 1]
    log = [json.loads(line) for line in (tmp_path / "t" / "trials" / "0" / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2]


@pytest.mark.slow
def test_a_trial_locked_by_another_process_is_skipped(probe, tmp_path):
    class Dying(Trials):
        def __call__(self, *trial):
            raise KeyboardInterrupt

    study = tmp_path / "t"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_tell", lambda *trial: None)  # it dies before it can tell what it found
        with pytest.raises(KeyboardInterrupt):
            tune(probe, SEARCH, 3, study, Dying())
    with hold(study / ".claims" / "0"):
        assert tune(probe, SEARCH, 3, study, others := Trials()) is None
        assert [number for number, *_ in others] == [1, 2]
        assert not (study / "best").exists()
    tuned = tune(probe, SEARCH, 3, study, last := Trials())
    assert [number for number, *_ in last] == [0]
    assert tuned.val_accuracy == max(accuracy for *_, accuracy in [*others, *last])


@pytest.mark.slow
def test_two_processes_share_the_trials(probe, tmp_path):
    (tmp_path / "run.toml").write_text(probe.to_toml())
    script = (
        "import sys; from pathlib import Path\nfrom refilled.config import Run\n"
        "from refilled.tuning.student import tune\n"
        "root = Path(sys.argv[1]); told = []\n"
        "run = Run.from_toml((root / 'run.toml').read_text())\n"
        f"tuned = tune(run, {SEARCH}, 12, root / 't', lambda number, *rest: told.append(number))\n"
        "print(tuned is not None, *told)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0].split() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sorted(int(number) for line in said for number in line[1:]) == list(range(12)), "each trial once"
    assert "True" in [line[0] for line in said]
    assert len(list((tmp_path / "t" / "best").glob("*/DONE"))) == 1


@pytest.mark.slow
def test_a_trial_whose_loss_explodes_is_excluded(probe, tmp_path, monkeypatch):
    real = tuning.complete

    def explosive(run, folder):
        if run.score == "val" and float(run.settings["C"]) > 0.5:
            raise NonFiniteError("the loss is not finite")
        return real(run, folder)

    monkeypatch.setattr(tuning, "complete", explosive)
    tuned = tune(probe, {"C": "0.1,1"}, 6, tmp_path / "t", told := Trials())
    assert {values["C"]: accuracy is None for _, values, accuracy in told} == {"0.1": False, "1": True}
    assert tuned.values == {"C": "0.1"}
    with pytest.raises(RunError, match="the loss diverged in each of 2 trials"):
        tune(probe, {"C": "1,2"}, 2, tmp_path / "u")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("search", "trials", "message"),
    [
        ({"learning_rat": "1..2"}, 2, "unknown parameter to search 'learning_rat'; known: C, "),
        ({"batchsize": "1..2"}, 2, "did you mean 'batch_size'"),
        ({"seed": "0..9"}, 2, "unknown parameter to search 'seed'"),
        ({"C": "2..1"}, 2, r"C=2\.\.1 is not a range: .* write C=LOW\.\.HIGH"),
        ({"C": "0..1:log"}, 2, r"C=0\.\.1:log is not a range"),
        ({"C": "1..2:lg"}, 2, r"C=1\.\.2:lg is not a range"),
        ({"C": "1,many"}, 2, "C=many: must be float"),
        ({"nesterov": "0..1"}, 2, "nesterov is not a number and has no range; list the values to try"),
        ({"schedule": "cosine,stair"}, 2, "'stair' cannot be tried"),
        ({"lr": "0..1"}, 2, r"lr = 0.* is out of range"),
        ({}, 2, "name at least one parameter"),
        (SEARCH, 0, "must be at least 1"),
    ],
)
def test_a_search_that_makes_no_sense_is_explained_and_nothing_is_written(probe, tmp_path, search, trials, message):
    with pytest.raises(RefilledError, match=message):
        tune(probe, search, trials, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_run_that_cannot_work_is_found_before_anything_is_written(probe, tmp_path):
    with pytest.raises(MethodError, match="learns from a teacher"):
        tune(replace(probe, teacher=None), SEARCH, 2, tmp_path / "t")
    with pytest.raises(RunError, match="give --val above 0"):
        tune(replace(probe, val=0.0), SEARCH, 2, tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.slow
def test_the_folder_of_another_search_is_refused(probe, tmp_path):
    tune(probe, SEARCH, 1, tmp_path / "t")
    for run, search in ((replace(probe, shots=5), SEARCH), (probe, {"C": "1..2"})):
        with pytest.raises(RunError, match="holds a tuning of another run or search"):
            tune(run, search, 1, tmp_path / "t")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(RunError, match="is not empty and holds no tuning"):
        tune(probe, SEARCH, 1, tmp_path / "mine")


def test_without_optuna_it_says_how_to_get_it(probe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RunError, match=r"pip install 'refilled\[tune\]'"):
        tune(probe, SEARCH, 1, tmp_path / "t")


@pytest.mark.slow
def test_the_command_prints_what_it_found(teacher, tmp_path):
    arguments = [
        "tune",
        "digits:5-9",
        "--teacher",
        teacher,
        "--method",
        "linear_probe",
        "--trials",
        "2",
        "--threads",
        "1",
    ]
    arguments += ["--shots", "12", "--search", "C=0.1..10:log", "--out", str(tmp_path / "t")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    for line in ("best values", "held-out accuracy", "test accuracy", "trial 1: C="):
        assert line in shown.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["accuracy"] == Result.load(Path(found["run"])).accuracy
    assert 0.1 <= found["values"]["C"] <= 10
