"""Comparisons: what is run, what is repeated, and what the page says."""

import io
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import unquote

import pytest
import torch
from rich.console import Console

from refilled.compare.comparison import Comparison, compare
from refilled.compare.page import RowResults, on_the_unlabelled, verdict
from refilled.compare.summary import Gain
from refilled.config import Run
from refilled.errors import RunError
from refilled.presets import PRESETS
from refilled.report import many
from refilled.report.many import Leave, write_missing
from refilled.report.page import Surroundings
from refilled.report.pictures import examples
from refilled.runs.experiment import complete
from refilled.runs.inference import teacher_accuracies
from refilled.runs.result import Result
from refilled.training.checkpoints import hold

TEXT = """
title = "<b>Digits</b> & {{7*7}}"
seeds = [0, 1]
[teacher]
task = "digits:0-4"
student = "wrn_10_1"
epochs = 2
shots = 8
threads = 1
[run]
task = "digits:5-9"
student = "wrn_10_1"
epochs = 2
shots = 8
threads = 1
[rows]
vanilla = { method = "vanilla" }
"<i>Re|Filled</i>" = { method = "refilled", settings = { centers = "global" } }
"""


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return compare(Comparison.from_toml(TEXT), tmp_path_factory.mktemp("comparison"), jobs=2)


@pytest.mark.slow
def test_the_page_shows_table_and_pictures_and_runs_nothing(page):
    parsed = _Page()
    parsed.feed(page.read_text())
    assert "<b>Digits</b> & {{7*7}}" in parsed.text  # as text, neither as tags nor as a template
    assert "<i>Re|Filled</i>" in parsed.text
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "iframe", "object", "link", "b", "i"}
    pictures = [attributes["src"] for tag, attributes in parsed.tags if tag == "img"]
    assert len(pictures) == 4
    assert all(source.startswith("data:image/svg+xml;base64,") for source in pictures)
    assert not re.search(r"https?://", page.read_text())
    policy = next(
        a["content"] for t, a in parsed.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")


@pytest.mark.slow
def test_the_page_shows_the_images_of_teacher_and_student(page):
    text = page.read_text()
    assert "What the teacher was trained on, and what the student sees" in text
    figures = page.parent / "figures"
    assert sorted(path.name for path in figures.iterdir()) == [
        "accuracy.svg",
        "curves.svg",
        "embeddings.svg",
        "images.svg",
    ]
    assert (figures / "images.svg").read_text().count("<image") == 3  # of the teacher, labelled, test


@pytest.mark.slow
def test_each_run_has_a_report_against_the_student_alone_and_the_page_links_to_it(page):
    parsed = _Page()
    parsed.feed(page.read_text())
    links = [unquote(attributes["href"]) for tag, attributes in parsed.tags if tag == "a"]
    runs = [f"{row}-s{seed}" for row in ("vanilla", "_i_Re_Filled__i_") for seed in (0, 1)]
    assert links == [f"{name}/report.html" for name in [*runs, "teacher"]]
    for link in links:
        report = _Page()
        report.feed((page.parent / link).read_text())
        assert ("a", {"href": "../report.html"}) in report.tags
        assert "Did the teacher help?" not in report.text  # the comparison knows
        seed, alone = link.split("/")[0][-1], "A single run establishes nothing."
        if link.startswith("_"):
            theirs = Result.load(page.parent / f"vanilla-s{seed}")
            alone = f"and vanilla-s{seed} {theirs.accuracy:.2f} %"
        assert alone in report.text
        assert ("Classes that gained and lost" in report.text) == link.startswith("_")
        assert (page.parent / link).with_name("README.md").exists()


@pytest.mark.slow
def test_raw_results_lie_beside_the_page(page):
    lines = (page.parent / "results.csv").read_text().splitlines()
    assert lines[0].startswith("row,seed,accuracy,ncm_accuracy,ncm_after_embedding")
    assert len(lines) == 1 + 2 * 2
    assert (page.parent / "results.md").read_text().count("\n") == 4


@pytest.mark.slow
def test_a_second_start_repeats_nothing(page):
    folder = page.parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    assert len(before) == 5
    reports = {path: path.stat().st_mtime_ns for path in folder.rglob("*/report.html")}
    compare(Comparison.from_toml(TEXT), folder, jobs=1)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")} == before
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*/report.html")} == reports


@pytest.mark.slow
def test_reports_that_are_missing_are_written_and_a_failure_loses_no_run(page, tmp_path, monkeypatch, in_process):
    """As after an end between a run and its report, and with an image that has gone since."""
    folder = tmp_path / "copy"
    shutil.copytree(page.parent, folder)
    comparison = Comparison.from_toml(TEXT)
    comparison = replace(comparison, seeds=[0], rows=dict(list(comparison.rows.items())[:1]), teacher=None)
    lost, kept = folder / "vanilla-s0" / "report.html", folder / "vanilla-s1" / "report.html"
    there, before = lost.read_text(), kept.stat().st_mtime_ns
    lost.unlink()
    monkeypatch.setattr(many, "report_among", Mock(side_effect=OSError("gone\x1b")))
    console = Console(record=True, width=10_000, file=io.StringIO())
    compare(comparison, folder, console=console, executor=in_process)
    text = console.export_text()
    assert (
        f"no report was written (OSError: gone\\x1b). The run is complete; try: refilled report {lost.parent}" in text
    )
    assert "vanilla-s0/report.html" not in (folder / "report.html").read_text()
    monkeypatch.undo()
    compare(comparison, folder, console=console, executor=in_process, reports=False)
    assert not lost.exists()
    compare(comparison, folder, console=console, executor=in_process)
    assert _without_times(lost.read_text()) == _without_times(there)
    assert kept.stat().st_mtime_ns == before


def _without_times(page: str) -> str:
    return re.sub(r"<tr><td>time per image.*?</td></tr>\s*", "", page)


def test_a_run_that_ends_before_the_one_it_is_compared_with_waits_for_it(tmp_path):
    around = Surroundings(tmp_path / "alone")
    Leave(around)(None, tmp_path / "run")  # would fail, but is not begun
    assert not (tmp_path / "run").exists()
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "DONE").touch()
    Leave(around)(None, tmp_path / "run")  # fails, and the run does not notice
    assert write_missing({tmp_path / "run": around}) == {}  # it is not finished


@pytest.mark.slow
def test_runs_of_another_machine_are_not_repeated(page):
    """A comparison is begun on one machine and read on another; what is done need not be done again."""
    record = next(page.parent.glob("*-s0/run.toml"))
    whole = record.read_text()
    try:
        elsewhere = re.sub('device = ".*"', 'device = "mps"', whole).replace("threads = 1", "threads = 64")
        record.write_text(elsewhere)
        compare(Comparison.from_toml(TEXT), page.parent)
        assert record.read_text() == elsewhere != whole  # where it was run remains true
    finally:
        record.write_text(whole)


@pytest.mark.slow
def test_a_comparison_may_be_moved_with_the_teacher_that_it_trained(page, tmp_path):
    away = tmp_path / "away"
    shutil.copytree(page.parent, away)
    run, folder = Comparison.from_toml(TEXT).grid(away)["<i>Re|Filled</i>"][0], away / "_i_Re_Filled__i_-s0"
    with pytest.raises(RunError, match="another configuration"):  # what is still there may be another teacher
        complete(run, folder)
    page.parent.rename(tmp_path / "gone")
    try:
        assert complete(run, folder) == Result.load(folder)
        assert Run.from_toml((folder / "run.toml").read_text()).teacher == str(away / "teacher")
        assert teacher_accuracies(folder)
        (away / "teacher").rename(away / "teacher2")
        with pytest.raises(RunError, match="another configuration"):  # one of another name
            complete(replace(run, teacher=str(away / "teacher2")), folder)
    finally:
        (tmp_path / "gone").rename(page.parent)


def test_a_row_may_change_a_preset():
    text = TEXT.replace(
        'method = "refilled", settings = { centers = "global" }', 'preset = "good", settings = { trust = 0 }'
    )
    runs = Comparison.from_toml(text).grid(Path())["<i>Re|Filled</i>"]
    assert runs[0].method == "refilled"
    assert runs[0].settings == {**PRESETS["good"]["settings"], "trust": 0}
    with pytest.raises(RunError, match="preset 'better'"):
        Comparison.from_toml(text.replace('"good"', '"better"'))


@pytest.mark.slow
def test_a_folder_of_another_comparison_is_refused(page):
    other = Comparison.from_toml(TEXT)
    with pytest.raises(RunError, match="holds a run of another configuration"):
        compare(replace(other, run=replace(other.run, lr=0.05)), page.parent)


@pytest.mark.slow
def test_a_folder_of_an_earlier_version_is_refused(page):
    """What a record does not name may have been otherwise: a default that came later says nothing about it."""
    record = next(path for path in page.parent.glob("*/run.toml") if "kd_average" in path.read_text())
    whole = record.read_text()
    try:
        record.write_text(whole.replace('kd_average = "elements"\n', ""))
        with pytest.raises(RunError, match="holds a run of another configuration"):
            compare(Comparison.from_toml(TEXT), page.parent)
    finally:
        record.write_text(whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_comparison_leaves_no_worker_and_resumes(tmp_path, number):
    (tmp_path / "c.toml").write_text(TEXT.replace("epochs = 2", "epochs = 200"))
    command = [sys.executable, "-W", "ignore", "-c", "from refilled.cli.app import main; main()"]
    arguments = ["compare", str(tmp_path / "c.toml"), "--out", str(tmp_path / "out")]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL) as process:
        log = tmp_path / "out" / "teacher" / "log.jsonl"
        while not (log.exists() and log.stat().st_size) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(number)
        process.wait(timeout=60)  # and not for the run
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    for _ in range(200):
        try:
            with hold(log.parent):
                break
        except RunError:
            time.sleep(0.1)
    else:
        pytest.fail("the worker still holds its run")
    assert (log.parent / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "title"),
        ("title = ", "not a comparison"),
        (TEXT.replace('method = "vanilla"', 'methd = "vanilla"'), "unknown key 'methd'; did you mean 'method'"),
        (TEXT.replace("[0, 1]", "[1, 1]"), "different seeds"),
        (TEXT.replace("epochs = 2", "epochs = -2"), "epochs = -2 is out of range"),
    ],
)
def test_a_wrong_comparison_is_refused_before_anything_trains(text, message):
    with pytest.raises(RunError, match=message):
        Comparison.from_toml(text)


def test_the_teacher_takes_no_part_where_the_method_has_none():
    run = Run(task="digits", student="wrn_10_1", teacher="t")
    grid = Comparison("x", run, {"a": {"method": "vanilla"}, "b": {"method": "rkd"}}).grid(Path("out"))
    assert grid["a"][0].teacher is None
    assert grid["b"][0].teacher == "t"


class _Row:
    def __init__(
        self, gain: Gain, seeds: int = 3, differences: tuple[str, ...] = (), ignored_teacher: bool = False
    ) -> None:
        self.ignored_teacher = ignored_teacher
        self.name, self.gain, self.results, self.differences = "ReFilled", gain, [None] * seeds, differences

    def gain_over(self, other):
        return self.gain

    def differences_to(self, other):
        return self.differences


def _found(tmp_path: Path, name: str, accuracies: list[float], unlabelled: bool, teacher: bool) -> RowResults:
    data = {"unlabelled": {"source": "rest", "images": 70, "fingerprint": "f"}} if unlabelled else {}
    rest = {"ncm_accuracy": 0.0, "class_accuracies": {}, "stages": {}, "seconds": 0.0, "parameters": 0}
    about = {"teacher": {"name": "t"} if teacher else None, "versions": {}, "hardware": {}}
    return RowResults(
        name, [Result(accuracy=a, data=data, **rest, **about) for a in accuracies], [tmp_path] * len(accuracies)
    )


def test_the_teacher_gets_no_credit_for_the_unlabelled_images(tmp_path):
    alone = _found(tmp_path, "alone", [60.0, 62.0], unlabelled=False, teacher=False)
    guesses = _found(tmp_path, "guesses", [65.0, 66.0], unlabelled=True, teacher=False)
    both = _found(tmp_path, "both", [70.0, 72.0], unlabelled=True, teacher=True)
    first, second = on_the_unlabelled([alone, guesses, both], alone, both)
    assert first == "both also learned from 70 images without labels, which alone did not see."
    assert "guesses reaches 65.5 %" in second
    assert f"gain of both over it: {both.gain_over(guesses)} points" in second
    assert on_the_unlabelled([guesses, both], guesses, both) == []  # the baseline saw them, too
    assert on_the_unlabelled([alone, guesses], both, alone) == []


def test_examples_show_each_class_in_turn():
    labels = torch.tensor([2, 0, 0, 0, 1, 2])
    assert examples(labels, 4).tolist() == [1, 2, 4, 0]
    assert examples(labels, 99).tolist() == [1, 2, 3, 4, 0, 5]
    assert examples(torch.full((9,), -1), 3).tolist() == [0, 4, 8]


@pytest.mark.parametrize(
    ("gain", "seeds", "said"),
    [
        (Gain(2, 1, 3), 3, "The teacher helped: ReFilled gains 2.00"),
        (Gain(2, -1, 5), 3, "It is not established that the teacher helped"),
        (Gain(-2, -3, -1), 3, "The teacher hurt: ReFilled loses 2.00"),
        (Gain(2, float("-inf"), float("inf")), 1, "a single seed establishes nothing"),
    ],
)
def test_the_verdict_is_honest(gain, seeds, said):
    assert said in verdict(_Row(gain, seeds), _Row(gain, seeds))


def test_the_verdict_gives_the_teacher_no_credit_for_another_recipe():
    said = verdict(_Row(Gain(9, 8, 10), differences=("cutmix 1.0 against 0.0",)), _Row(Gain(9, 8, 10)))
    assert said.startswith("It is not established that the teacher helped")
    assert "cutmix 1.0 against 0.0" in said


def test_the_verdict_says_that_a_teacher_was_ignored():
    said = verdict(_Row(Gain(0, 0, 0), ignored_teacher=True), _Row(Gain(0, 0, 0)))
    assert said.startswith("The teacher was ignored in all runs of ReFilled, since it has nothing to teach: +0.00")


def test_recipes_are_compared_by_what_the_runs_were_trained_with(tmp_path):
    rows = []
    for name, changes in (("a", {"method": "vanilla"}), ("b", {"cutmix": 1.0, "epochs": 7, "seed": 3})):
        (tmp_path / name).mkdir()
        text = replace(Run(task="digits", student="wrn_10_1"), **changes).to_toml()
        (tmp_path / name / "run.toml").write_text(text)
        rows.append(RowResults(name, [], [tmp_path / name]))
    assert rows[1].differences_to(rows[0]) == ["epochs 7 against 60", "cutmix 1.0 against 0.0"]
    assert rows[0].differences_to(rows[0]) == []


@pytest.mark.slow
def test_a_comparison_goes_to_the_executor_that_it_is_given(tmp_path, in_process):
    comparison = Comparison.from_toml(TEXT)
    small = replace(comparison, seeds=[0], run=replace(comparison.run, epochs=1))
    compare(small, tmp_path / "runs", 3, executor=in_process)
    assert in_process.jobs == [1, 3]  # the teacher, then the rows
    assert len(in_process.calls) == 1 + len(small.rows)
