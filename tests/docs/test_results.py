"""The figures in the documents are those of the raw results."""

import importlib.util
import re
from functools import cache
from itertools import permutations
from pathlib import Path
from statistics import mean

import pytest

from refilled.compare.summary import spread

DOCS = Path(__file__).parents[2] / "docs"
MEAN = re.compile(r"(?<![+\-\d.])(\d+\.\d+) ± (\d+\.\d+)")
GAIN = re.compile(r"([+-]\d+\.\d\d) \[([+-]\d+\.\d\d), ([+-]\d+\.\d\d)\]")
PAGES = [
    DOCS.parent / "README.md",
    *(DOCS / name for name in ("results.md", "method.md", "all-results.md", "fewshot.md")),
]


def build_script():
    spec = importlib.util.spec_from_file_location("build_results", DOCS / "build_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = build_script()


@cache
def seeds_of(name: str) -> list[dict[str, float]]:
    """Every row of figures of a file, by seed."""
    lines = script.lines_of(name)
    if script.is_comparison(lines):
        rows = script.comparison_rows(lines).values()
        stages = [dict(enumerate(row.after_stage_1)) for row in rows if row.after_stage_1]
        return [*(row.accuracy for row in rows), *(row.ncm for row in rows), *stages]
    return list(script.table_cells(lines).values()) if "row" in lines[0] else []


@cache
def means_of(name: str) -> set[str]:
    """Every mean with a spread or interval that a file holds, to two decimals and to one."""
    several = [list(seeds.values()) for seeds in seeds_of(name) if len(seeds) > 1]
    pairs = {f"{mean(figures):.{digits}f} ± {spread(figures):.{digits}f}" for figures in several for digits in (1, 2)}
    lines = [line for line in script.lines_of(name) if line.get("interval")]
    return pairs | {f"{line.get('value') or line['accuracy']} ± {line['interval']}" for line in lines}


@cache
def gains_of(name: str) -> set[str]:
    """Every gain of a row over another one of the same file, or over the baseline that the page names."""
    rows = seeds_of(name)
    for part in script.about_results():
        for about in part["result"]:
            if about["name"] == name and ": " in about.get("baseline", ""):
                rows = [*rows, script._elsewhere(about["baseline"])]
    gains = (script.gain_of(ours, theirs) for ours, theirs in permutations(rows, 2))
    return {GAIN.search(str(gain)).group() for gain in gains if gain is not None and GAIN.search(str(gain))}


def all_names() -> list[str]:
    return sorted(path.stem for path in (DOCS / "results").glob("*.csv"))


def test_the_page_of_all_results_is_what_the_raw_results_say():
    assert script.PAGE.read_text() == script.build(), "run: make pages"


def test_every_file_of_raw_results_is_on_the_page_once():
    assert sorted(about["name"] for part in script.about_results() for about in part["result"]) == all_names()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_means_and_gains_are_those_of_the_raw_results(page):
    """Of the files that a paragraph or row of a table links to, else of any file."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for block in re.split(r"\n\n|\n(?=\||\* )", text):
        linked = re.findall(r"results/([\w-]+)\.csv", block)
        if page.name == "results.md" and linked == ["birds-imagenet"]:
            linked.append("birds")  # whose student alone is its baseline
        means = {pair for name in linked or all_names() for pair in means_of(name)}
        gains = {gain for name in linked or all_names() for gain in gains_of(name)}
        assert {found.group() for found in MEAN.finditer(block)} <= means, block
        assert {found.group() for found in GAIN.finditer(block)} <= gains, block


def evidence(word: str) -> list[str]:
    """The figures with a decimal in the sentences of method.md that begin with ``word``."""
    text = " ".join((DOCS / "method.md").read_text().split())
    sentences = re.findall(rf"(?<=[.*)] )({word}.*?\.)(?= [A-Z*#(]|$)", text)
    assert len(sentences) >= 8
    return [figure for sentence in sentences for figure in re.findall(r"(?<![\d.x])\d+\.\d\b", sentence)]


def test_the_choices_in_the_method_are_those_of_the_raw_results():
    accuracies = {f"{figure:.1f}" for row in seeds_of("cifar100-halves-choices") for figure in row.values()}
    assert set(evidence("Choices")) <= accuracies


def test_the_leads_in_the_method_are_those_of_the_log():
    log = (DOCS / "log.md").read_text()
    assert [figure for figure in evidence("Lead") if figure not in log] == []


def test_a_wrong_figure_would_be_noticed():
    assert "83.46 ± 0.55" in means_of("birds-long")
    assert "83.5 ± 0.5" in means_of("birds-long")
    assert "83.47 ± 0.55" not in means_of("birds-long")
    assert "+8.37 [+6.98, +9.77]" in gains_of("birds-long")
