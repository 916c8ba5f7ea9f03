"""Numbers out of range in every numeric option of every command: a refusal by name, and nothing is written."""

import functools
import inspect
import sys
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
import typer

from commands import call
from refilled.cli.app import app
from refilled.config import FewShotRun, MetaRun, Run

VALUES = ["nan", "inf", "-inf", "-1", "0", "1e400", str(10**30), "", "many"]
LEGAL = {
    "--least-steps": "no minimum",
    "--weight-decay": "none",
    "--ema": "no average",
    "--head-steps": "none",
    "--warmup": "none",
    "--color-jitter": "off",
    "--random-erasing": "off",
    "--mixup": "off",
    "--cutmix": "off",
    "--unlabelled-span": "no part of a stage uses unlabelled images",
    "--seed": "a seed like any other",
    "--val": "no images are held out",
    "--image-memory": "all images are decoded to disk",
    "--teacher-mean": "the teacher's images were only divided",
    "--port": "a free one is taken",
    "--cpus": "Ray reserves none",
    "--gpus": "Ray reserves none",
    "labels --top": "only the summary is printed",
}
"""Where 0 is legal, and what it means. No other value above is legal anywhere."""

MISSING = "no_such_thing"
"""What stops a command whose numbers are all legal: a task, a folder or a table that does not exist."""

REQUIRED = {"search": "lr=0.1,0.2", "views": "1", "out": "table.csv"}


def numeric(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(numeric, get_args(annotation)))


def functions(of: typer.Typer, *before: str) -> dict[str, Any]:
    """Return the function of each command by the words that call it."""
    found = {}
    for command in of.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        found[" ".join((*before, name))] = command.callback
    for group in of.registered_groups:
        found |= functions(group.typer_instance, *before, group.name)
    return found


def parsers(of: Any, *before: str) -> dict[str, Any]:
    """Return the parser of each command by the words that call it."""
    if not hasattr(of, "commands"):
        return {" ".join(before): of}
    return {words: found for name, each in of.commands.items() for words, found in parsers(each, *before, name).items()}


PARSERS = parsers(typer.main.get_command(app))
TYPES = {words: inspect.signature(function, eval_str=True).parameters for words, function in functions(app).items()}
NUMBERS = [
    (words, parameter)
    for words, parser in PARSERS.items()
    for parameter in parser.params
    if parameter.name in TYPES[words] and numeric(TYPES[words][parameter.name].annotation)
]


@pytest.fixture(scope="module", autouse=True)
def parsers_built_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.main.get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Return a function that runs a command, which must be refused, and returns the one sentence of the refusal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").touch()

    def run(*arguments: str) -> str:
        code = call(*arguments)
        said = capsys.readouterr()
        assert code == 2, said
        assert "Traceback" not in said.err
        assert not said.out
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        lines = [line.strip(" │") for line in said.err.splitlines() if line.startswith(("error: ", "│"))]
        assert len(lines) == 1, said.err
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("words", "parameter"), NUMBERS, ids=[f"{words} {parameter.opts[0]}" for words, parameter in NUMBERS]
)
def test_every_number_out_of_range_is_refused_by_the_name_of_its_option(refused, words, parameter):
    option = parameter.opts[0]
    rest = [MISSING for p in PARSERS[words].params if p.param_type_name == "argument" and p.nargs != 0]
    for other in PARSERS[words].params:
        if other.required and other.param_type_name == "option" and other.name != parameter.name:
            rest += [other.opts[0], REQUIRED.get(other.name, MISSING)]
    if words == "demo":
        rest += ["--out", "file"]
    for value in VALUES:
        said = refused(*words.split(), *rest, option, *[value] * parameter.nargs)
        named = option in said or f"{parameter.name} = " in said
        if value == "0" and {option, f"{words} {option}"} & LEGAL.keys():
            assert not named, said
        else:
            assert named, said
            assert "; " in said or "Input should be" in said or "not a" in said, said  # what would be right


def test_the_walk_meets_every_numeric_field_of_a_configuration():
    walked = {(words, parameter.name) for words, parameter in NUMBERS}
    for kind, words, without in (
        (Run, "distill", {"teacher_size"}),  # a text, because of 'auto'; below
        (FewShotRun, "fewshot", set()),
        (MetaRun, "meta-train", set()),
    ):
        hints = get_type_hints(kind)
        named = {f.name for f in fields(kind) if numeric(hints[f.name])} - without
        assert {(words, name) for name in named} <= walked
        assert len(named) > 5
    assert {words for words, _ in NUMBERS} >= {"predict", "serve", "compare", "tune", "teachers", "cache build", "demo"}


LONG = "9" * 5000
TEXTS = {
    "teacher-size": (
        ["distill", MISSING, "--teacher-size"],
        ["nan", "-1", "0", "1e400", "4097", str(10**30), LONG, "", "many", "²"],
        ("teacher_size", "--teacher-size"),
    ),
    "time-limit": (
        ["train", MISSING, "--time-limit"],
        ["nan", "-1", "0", "0s", "-1s", "1e400s", "8761h", f"{LONG}h", "", "many", "²s", "1h1h"],
        ("time",),
    ),
    "sizes": (
        ["teachers", MISSING, "--candidates", MISSING, "--sizes"],
        ["nan", "-1", "0", "1e400", "4097", str(10**30), LONG, "many", "²", "32,0", "32;64"],
        ("size in pixels",),
    ),
    "task": (
        ["train"],
        [f"digits@{name}={value}" for name in ("shots", "val", "size", "seed") for value in ("-1", "nan", "many", "")]
        + ["digits@shots=0", "digits@size=4097", "digits@val=1", f"digits@seed={10**30}", f"digits@shots={LONG}"],
        ("shots", "val", "size", "seed"),
    ),
}


@pytest.mark.parametrize("which", TEXTS)
def test_numbers_in_texts_are_checked_in_the_same_way(refused, which):
    arguments, values, names = TEXTS[which]
    for value in values:
        said = refused(*arguments, value)
        assert MISSING not in said or which == "task", said
        assert any(name in said for name in names), (value, said)
