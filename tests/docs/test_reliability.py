"""docs/reliability.md names tests that exist, and a test for every fault."""

import ast
import importlib.util
from pathlib import Path

from soak import ROWS

ROOT = Path(__file__).parents[2]


def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for group in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        names |= {f"{group.name}::{node.name}" for node in group.body if isinstance(node, ast.FunctionDef)}
    return names


def test_every_fault_has_tests_that_exist():
    missing = []
    for name, row in ROWS.items():
        assert row["tests"], name
        for test in row["tests"]:
            file, _, function = test.partition("::")
            if function not in names_in(file):
                missing.append((name, test))
    assert not missing


def test_the_page_is_that_of_the_file():
    spec = importlib.util.spec_from_file_location("build_reliability", ROOT / "docs" / "build_reliability.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run 'make pages'"
