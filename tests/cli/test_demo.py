"""The demo: what it compares, and that it prints what its own runs found."""

import csv
import re
from dataclasses import replace
from importlib.resources import files

import pytest
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.compare.comparison import Comparison
from refilled.compare.summary import paired_gain
from refilled.data import load_task
from refilled.models import load_teacher


def whole_demo() -> Comparison:
    return Comparison.from_toml((files("refilled.compare") / "demo.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shortened(tmp_path_factory):
    """Run the demo with few steps, and return its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "runs"
    whole = whole_demo()
    short = replace(whole, seeds=[0, 1], run=replace(whole.run, epochs=1, least_steps=33))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Comparison, "from_toml", lambda text: short)
        result = CliRunner().invoke(app, ["demo", "--out", str(folder), "--jobs", "1"])
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"
    return folder, result.output


def test_the_demo_compares_with_the_student_alone_and_its_teacher_knows_no_digit():
    demo = whole_demo()
    first, *_, last = demo.grid(files("refilled.compare")).values()
    assert {run.method for run in first.values()} == {"vanilla"}
    assert {(run.method, run.unlabelled) for run in last.values()} == {("refilled", "rest")}
    assert len(demo.seeds) >= 5
    of_teacher = load_teacher(demo.run.teacher).class_names
    assert not set("0123456789") & {name[0] for name in of_teacher}
    assert load_task("digits").classes == tuple("0123456789")


@pytest.mark.slow
def test_the_sentence_is_computed_from_the_runs(shortened):
    folder, printed = shortened
    found: dict[str, list[float]] = {}
    for line in csv.DictReader((folder / "results.csv").read_text().splitlines()):
        found.setdefault(line["row"], []).append(float(line["accuracy"]))
    gain = paired_gain(found["teacher + unlabelled"], found["alone"])
    said = next(line for line in printed.splitlines() if "95 % interval" in line)
    said_gain = float(re.search(r"([-+]?[\d.]+) points", said)[1])
    assert said_gain == pytest.approx(gain.mean if "not established" in said else abs(gain.mean), abs=0.02)
    assert said.startswith("The teacher helped") == (gain.low > 0)
    assert said.startswith("The teacher hurt") == (gain.high < 0)
    assert "also learned from 1418 images without labels, which alone did not see" in printed


@pytest.mark.slow
def test_the_page_of_the_demo_shows_letters_and_digits(shortened):
    folder, printed = shortened
    assert f"page: {folder / 'report.html'}" in printed
    images = (folder / "figures" / "images.svg").read_text()
    assert images.count("<image") == 4  # of the teacher, labelled, without labels, scored
    page = (folder / "report.html").read_text()
    for sentence in (printed.splitlines()[-4], printed.splitlines()[-3]):
        assert sentence.replace("'", "&#39;") in page
