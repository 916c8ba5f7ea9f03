"""Pages that are written from other files are up to date, and name what exists."""

import ast
import importlib.util
from pathlib import Path

import pytest

from refilled.methods import list_methods
from soak import ROWS

ROOT = Path(__file__).parents[2]


def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for group in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        names |= {f"{group.name}::{node.name}" for node in group.body if isinstance(node, ast.FunctionDef)}
    return names


@pytest.mark.slow
def test_every_fault_has_tests_that_exist():
    missing = []
    for name, row in ROWS.items():
        assert row["tests"], name
        for test in row["tests"]:
            file, _, function = test.partition("::")
            if function not in names_in(file):
                missing.append((name, test))
    assert not missing


@pytest.mark.parametrize("name", ["build_reliability", "build_messages"])
def test_a_written_page_is_that_of_its_sources(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run 'make pages'"


def test_the_api_has_every_method():
    page = (ROOT / "docs" / "api" / "methods.md").read_text(encoding="utf-8")
    assert not [name for name in list_methods() if f".{name}\n" not in page]
