"""What the documents show is run, as it stands there."""

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import refilled
from drawn import folder, picture, put
from refilled.cli.app import app
from refilled.compare.comparison import Comparison

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def folder_of_a_reader(tmp_path, monkeypatch, teacher) -> Path:
    """A folder that holds what the commands of the documents take for granted, the current one."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "photos", dict.fromkeys(("robin", "wren", "owl"), 8), size=32, tinted=True, suffix="jpg")
    put(tmp_path / "more" / "a.png", picture(0, 32))
    put(tmp_path / "new.jpg", picture(1, 32))
    return tmp_path


def commands(text: str) -> list[str]:
    """List the commands of this package in the blocks of a document, in its order."""
    lines = (line for block in blocks("sh", text) for line in block.replace("\\\n", " ").splitlines())
    return [line.partition("#")[0] for line in lines if "bin/refilled" in line]


def quick(command: str, teacher: str) -> list[str]:
    """Return the arguments of a command, with few epochs and a small student instead of timm's.

    The weights of timm's teacher would have to be downloaded; a small teacher takes its place.
    """
    program, *arguments = shlex.split(command.replace("timm/resnet50", teacher))
    assert program == ".venv/bin/refilled"
    if arguments[0] in ("train", "distill", "compare", "tune"):
        if "--epochs" in arguments:
            arguments[arguments.index("--epochs") + 1] = "2"
        else:
            arguments += ["--epochs", "2"]
        arguments += ["--threads", "1"]
    return [argument.replace("timm/mobilenetv3_small_050", "wrn_10_1") for argument in arguments]


@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", "docs/start.md", "docs/data.md"])
def test_the_commands_of_the_documents_run(document, folder_of_a_reader, teacher):
    listed = commands((ROOT / document).read_text())
    assert listed
    for command in listed:
        result = CliRunner().invoke(app, quick(command, teacher))
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception}"


@pytest.mark.parametrize("document", ["README.md", "docs/start.md", "docs/data.md"])
def test_the_python_of_the_documents_runs(document):
    found = blocks("python", (ROOT / document).read_text())
    assert found
    for block in found:
        exec(compile(block, document, "exec"), {})


def test_the_first_two_commands_of_the_readme_set_everything_up():
    first = blocks("sh", (ROOT / "README.md").read_text())[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().partition("## Links")[0].split()) <= 600


def rows_of_tables(text: str) -> list[list[str]]:
    """Return the cells of every row of every Markdown table as they are read: no lines of dashes, no addresses."""
    text = re.sub(r"\]\([^)]*\)", "]", text)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    rows = [line.strip().strip("|").split("|") for line in prose.splitlines() if line.lstrip().startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not set("".join(row)) <= set("-: ")]


def test_the_table_of_the_readme_is_small():
    head, *rows = rows_of_tables((ROOT / "README.md").read_text())
    assert len(rows) == 3
    for cell in [*head, *(cell for row in rows for cell in row)]:
        assert len(re.findall(r"[\w.-]+", cell)) <= 4, cell


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_cell_of_a_table_is_a_paragraph(path):
    for row in rows_of_tables(path.read_text()):
        for cell in row:
            assert len(cell) <= 80, cell


def test_the_make_targets_of_the_documents_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in [*DOCUMENTS, ROOT / ".ci/run"]:
        assert set(re.findall(r"^make (\w+)", path.read_text(), re.MULTILINE)) <= targets


def test_links_within_the_documents_lead_somewhere():
    for document in DOCUMENTS:
        text = document.read_text()
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)|(?:src|srcset)=\"([^\"]+)\"", text):
            assert (document.parent / "".join(link)).exists(), f"{document.name}: {link}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/comparisons/*.toml")), ids=lambda path: path.stem)
def test_published_comparisons_can_be_read(path, monkeypatch):
    monkeypatch.setenv("REFILLED_DATA", "data")
    Comparison.from_toml(path.read_text())


@pytest.mark.slow
def test_examples_in_docstrings_are_true():
    modules = [module.name for module in pkgutil.walk_packages(refilled.__path__, "refilled.")]
    results = [doctest.testmod(importlib.import_module(name)) for name in ["refilled", *modules]]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) > 3
