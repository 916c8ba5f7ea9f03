"""What the documents show is run, as it stands there."""

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import refilled
from refilled.cli.app import app
from refilled.compare.comparison import Comparison

ROOT = Path(__file__).parents[1]


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def photos(tmp_path, monkeypatch) -> None:
    """Make the folders and files that the commands of the README take for granted."""
    monkeypatch.chdir(tmp_path)
    chance = np.random.default_rng(0)
    for channel, name in enumerate(("robin", "wren", "owl")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for index in range(8):
            pixels = chance.integers(0, 90, (32, 32, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / f"{index}.jpg")
    (tmp_path / "more").mkdir()
    Image.fromarray(pixels).save(tmp_path / "more" / "a.png")
    Image.fromarray(pixels).save(tmp_path / "new.jpg")


def test_the_commands_of_the_readme_run(photos):
    text = (ROOT / "README.md").read_text()
    # The block with the embedded data comes last for the reader; here it goes first, since it makes a teacher that
    # stands in for timm's, whose weights would have to be downloaded.
    commands = sorted(
        (
            line
            for block in blocks("sh", text)
            for line in block.replace("\\\n", " ").splitlines()
            if "refilled" in line
        ),
        key=lambda line: ("digits" not in line, "compare" in line),
    )
    assert len(commands) >= 6
    for command in commands:
        command = command.partition("#")[0].replace("timm/resnet50", "runs/teacher")
        arguments = shlex.split(command)
        assert arguments.pop(0) == ".venv/bin/refilled"
        if arguments[0] in ("train", "distill", "compare", "tune"):
            if "--epochs" not in arguments:
                arguments += ["--epochs", "2"]
            arguments += ["--threads", "1"]
            arguments = [a.replace("timm/mobilenetv3_small_050", "wrn_10_1") for a in arguments]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception}"


def test_the_python_of_the_readme_runs():
    for block in blocks("python", (ROOT / "README.md").read_text()):
        exec(compile(block, "README.md", "exec"), {})


def test_the_make_targets_of_the_documents_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        assert set(re.findall(r"^make (\w+)", (ROOT / name).read_text(), re.MULTILINE)) <= targets


def test_links_within_the_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/comparisons/*.toml")), ids=lambda path: path.stem)
def test_published_comparisons_can_be_read(path, monkeypatch):
    monkeypatch.setenv("REFILLED_DATA", "data")
    Comparison.from_toml(path.read_text())


def test_examples_in_docstrings_are_true():
    modules = [module.name for module in pkgutil.walk_packages(refilled.__path__, "refilled.")]
    results = [doctest.testmod(importlib.import_module(name)) for name in ["refilled", *modules]]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) > 3
