"""The check of the house style finds what it should, and nothing else."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check_style():
    spec = importlib.util.spec_from_file_location("check_style", ROOT / "docs" / "check_style.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


style = check_style()


@pytest.mark.slow
def test_the_documents_are_in_the_house_style(capsys):
    assert style.main() == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "It computes on so many threads.",
        "None for ever so many.",
        "10 images a class",
        "tasks a second",
        "An interrupted run goes on with the same command.",
        "Another process is at it.",
        "a model of one's own",
        "The standard deviation likewise.",
        "Besides, there are options.",
        "the mean in place of the sum",
        '    """Say where an image came from."""',
        "more than 8 bits a channel",
        "A column of fractions is no label.",
        "A worker would wait for ever.",
        "Hidden files are passed over.",
        "The label is 'cat' in the one and 'dog' in the other.",
        "label: The label column; found by name if None.",
        '    """Digest the states of the files."""',
    ],
)
def test_a_listed_phrase_is_refused(text):
    (fault,) = style.faults_in(text)
    assert fault[0] == 1
    assert fault[1].strip(' "') in text


@pytest.mark.parametrize(
    "text",
    [
        "10 images per class",
        "Return where an image came from.",
        "If there is no label, or there are no images, an error says so.",
        "The page says so, and the run resumes.",
        "Give the images a class of their own.",
        "| 10 images per class | 10 per class |",
    ],
)
def test_plain_english_passes(text):
    assert not list(style.faults_in(text))


def test_the_table_of_the_house_style_may_quote_what_it_refuses():
    table = "| write | not |\n|---|---|\n| 10 images per class | 10 images a class |\n"
    assert not list(style.faults_in(table))
    assert len(list(style.faults_in(table + "\n10 images a class"))) == 1
