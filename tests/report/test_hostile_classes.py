"""Hostile class names, in every place where a class name is written or shown."""

import csv
import io
import json
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pandas
import pytest
from typer.testing import CliRunner

import drawn
from browser import chromium
from refilled.cli.app import app

NAMES = [
    # HTML
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "' onmouseover='alert(1)",
    "&lt;b&gt;", "</title><h1>", "<!-- ", "]]>", "javascript:alert(1)",
    # templates and format strings
    "{{7*7}}", "{% raise %}", "${7*7}", "#{7*7}", "%s%n%d", "{0}", "{name!r}",
    # spreadsheets
    "=cmd()", "+1+1", "-2+3", "@SUM(A1)", '=HYPERLINK("http://x","y")', "\t=1+1",
    # formulas, markup and terminals
    "$\\frac{1}{2}$", "$", "\\alpha_", "a_b^c", "[/b]", "[red]x[/red]", "[link=http://x]y[/link]",
    "\x1b[31mred\x1b[0m", "\x1b]8;;http://x\x07y",
    # paths, separators and lines
    "../../etc/passwd", "..", "C:\\temp\\x", "a/b", "two\nlines", "a\r\nb", "a,b;c\"d'",
    # Unicode, length and words that mean something else
    "\u202egnp.exe", "e\u0301 \u00e9", "\U0001f469\u200d\U0001f52c", "x" * 300, "NULL", "nan", "0", "--help",
]  # fmt: skip


def refilled(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "a.png"
    drawn.picture(0, 8).save(path)
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    labels = 5 * NAMES
    rows = [{"image": drawn.png(drawn.picture(number, 8)), "label": label} for number, label in enumerate(labels)]
    table = tmp_path_factory.mktemp("data") / "pictures.parquet"
    pandas.DataFrame(rows).to_parquet(table)
    folder = tmp_path_factory.mktemp("runs") / "student"
    refilled("train", table, "--model", "wrn_10_1", "--epochs", 1, "--threads", 1, "--quiet", "--out", folder)
    return folder


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_records_return_the_names_unchanged(student):
    assert sorted(json.loads((student / "model.json").read_text())["classes"]) == sorted(NAMES)
    assert tomllib.loads((student / "run.toml").read_text())
    assert json.loads((student / "result.json").read_text())


@pytest.mark.slow
def test_pages_show_the_names_as_text(student):
    page = _Page()
    page.feed((student / "report.html").read_text())
    assert not page.tags & {"script", "iframe", "object", "link"}
    assert not page.handlers
    assert "\u202e" not in page.text
    assert "\x1b" not in page.text
    assert "{{7*7}}" in page.text


@pytest.mark.slow
def test_the_terminal_gets_no_control_characters_and_no_markup(student, picture):
    shown = refilled("predict", student, picture, "--top", len(NAMES))
    assert "[/b]" in shown
    assert "[red]x[/red]" in shown
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(shown)


@pytest.mark.slow
def test_tables_have_no_formulas_and_a_column_for_each_class(student, picture, tmp_path):
    rows = list(csv.DictReader(io.StringIO(refilled("predict", student, picture, "--csv"))))
    assert len(rows) == 1
    columns = set(rows[0]) - {"image", "class"}
    assert len(columns) == len(NAMES)
    cells = [*columns, rows[0]["class"]]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    answer = json.loads(refilled("predict", student, picture, "--json"))
    assert sorted(answer["probabilities"]) == sorted(NAMES)
    refilled("embed", student, picture.parent, "--out", tmp_path / "e.parquet")
    assert set(pandas.read_parquet(tmp_path / "e.parquet")["class"]) <= set(NAMES)


@pytest.mark.slow
def test_an_exported_file_returns_the_names_unchanged(student, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    refilled("export", student, "--format", "onnx", "--out", tmp_path / "model.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    classes = json.loads((student / "model.json").read_text())["classes"]
    assert json.loads(metadata["classes"]) == classes


@pytest.mark.slow
def test_a_browser_runs_no_script_and_requests_nothing(student):
    with chromium() as browser:
        page = browser.new_page()
        events = []
        for kind in ("console", "pageerror", "dialog"):
            page.on(kind, lambda event, kind=kind: events.append((kind, str(event))))
        page.on("request", lambda request: events.append(("request", request.url)))
        address = (student / "report.html").as_uri()
        page.goto(address)
        outside = [event for event in events if event[0] != "request" or not event[1].startswith((address, "data:"))]
        assert not outside
        assert page.locator("script").count() == 0
