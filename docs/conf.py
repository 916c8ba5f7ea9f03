"""Configuration of the documentation site: make docs."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "refilled"
author = "the refilled developers"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.doctest"]
exclude_patterns = ["_build", "comparisons", "results"]

html_theme = "furo"
html_title = f"refilled {release}"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# The examples in the docstrings see the names of their modules, as when Python's doctest runs them.
doctest_global_setup = """
import torch
from refilled.losses.mining import semi_hard_triplets
"""
