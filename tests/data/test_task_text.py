"""The text form of a task: what it means, what it refuses, and that nothing breaks it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from drawn import folder
from refilled.data import list_datasets, load_task
from refilled.data.selection import select_classes
from refilled.data.source import ArrayPart, Source
from refilled.data.task_text import TaskOptions, parse_task_text
from refilled.errors import RefilledError, TaskError
from soak import repetitions

ANIMALS = ["cat", "dog", "sea lion", "7", "a-b"]
HALF = select_classes("random-half", ANIMALS, seed=3)


def take_apart(text: str, data_root: Path = Path("/nowhere")):
    return parse_task_text(text, data_root, TaskOptions())


def test_sources_selections_and_options_are_told_apart(tmp_path):
    (tmp_path / "birds").mkdir()
    parsed = take_apart("cifar100:0-49@shots=50,seed=1")
    assert (parsed.kind, parsed.selection) == ("cifar100", "0-49")
    assert (parsed.options.shots, parsed.options.seed) == (50, 1)
    parsed = take_apart("hub:uoft-cs/cifar100: apple, bee ")
    assert (parsed.kind, parsed.source, parsed.selection) == ("hub", "uoft-cs/cifar100", "apple, bee")
    parsed = take_apart("birds:random-half", tmp_path)
    assert (parsed.kind, parsed.source, parsed.selection) == ("path", str(tmp_path / "birds"), "random-half")
    assert take_apart(f"folder:{tmp_path}@val=0.2,size=64,augment=crop").options == TaskOptions(
        val=0.2, size=64, augment="crop"
    )


@pytest.mark.parametrize("name", ["a b", "a:b", "a@b", "a@seed=1", "ünï 鳥", "digits", "a:b:0-3", "x,y=z", "100%"])
@pytest.mark.parametrize("prefix", ["folder:", ""])
@pytest.mark.parametrize("end", ["", ":0-3", "@seed=4", ":random-half@shots=2,seed=4"])
def test_paths_of_any_name_are_found_and_their_resolved_text_means_the_same(tmp_path, name, prefix, end):
    (tmp_path / name).mkdir()
    (tmp_path / "a").mkdir(exist_ok=True)
    parsed = take_apart(f"{prefix}{tmp_path / name}{end}")
    assert parsed.source == str(tmp_path / name)
    assert (parsed.selection, parsed.options.seed) == (
        end.partition("@")[0][1:] or None,
        4 if "seed" in end else 0,
    )
    for root in (Path("/nowhere"), tmp_path):
        assert take_apart(parsed.resolved(root), root) == parsed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; give one such as"),
        ("cifar10", "did you mean 'cifar100'"),
        ("digits:", "names no classes"),
        ("digits@shot=5", "did you mean 'shots'"),
        ("digits@shots=five", "whole number"),
        ("digits@shots=0", "leaves no images"),
        ("digits@val=1", "not a fraction"),
        ("digits@val=nan", "not a fraction"),
        ("digits@val=much", "must be a number"),
        ("digits@size=0", "out of range"),
        ("digits@augment=flip", "unknown augmentation"),
        ("digits@label=", "has no value"),
        ("digits@label=x", "no columns"),
        ("hub:", "names no data set"),
        ("folder:photos", "no folder or file 'photos'"),
        ("folder:", "no folder or file"),
        ("~nobody-of-this-name/photos", "no folder or file"),
        ("digits:cat", "unknown class 'cat'"),
        ("digits:5-3", "not a range"),
        ("digits:3-10", "classes 0-9"),
        ("digits:3", "at least two classes"),
        ("digits:0-4,", "unknown class ''"),
    ],
)
def test_mistakes_are_named(text, message, tmp_path):
    with pytest.raises(TaskError, match=message):
        load_task(text, data_root=tmp_path)


def test_contradictory_shots_are_refused():
    with pytest.raises(TaskError, match="leave out one"):
        load_task("digits@shots=5", shots=6)
    assert load_task("digits@shots=5", shots=5).name == load_task("digits", shots=5).name == "digits@shots=5"


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("1-2", [1, 2]),
        ("4,0,0-1", [0, 1, 4]),
        ("dog,cat", [0, 1]),
        ("sea lion , dog", [1, 2]),
        ("7", [3]),  # a class of this name, not the number
        ("a-b", [4]),
        ("random-half", HALF),
        ("other-half", sorted({0, 1, 2, 3, 4} - set(HALF))),
    ],
)
def test_selections(selection, chosen):
    assert select_classes(selection, ANIMALS, seed=3) == chosen


def test_halves_differ_with_the_seed():
    halves = {tuple(select_classes("random-half", range(20), seed=seed)) for seed in range(5)}
    assert {len(half) for half in halves} == {10}
    assert len(halves) == 5


def test_a_name_of_two_classes_is_chosen_by_number():
    with pytest.raises(TaskError, match="classes 0, 2"):
        select_classes("crane", ["crane", "crow", "crane"], seed=0)


def test_the_list_of_data_sets_has_a_line_on_each():
    names = [name for name, line in list_datasets() if line]
    assert names[:3] == ["digits", "letters", "cifar100"]


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """A folder with one small data set, no network, and digits that load at once."""

    def no_network(*_):
        raise ConnectionError("no network")

    folder(tmp_path / "pets", {"cat": 4, "dog": 4}, size=4)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8)).astype(np.uint8)
    part = ArrayPart(np.arange(20) // 2, pixels, "digits")
    monkeypatch.setattr("refilled.data.opening.open_digits", lambda: Source(tuple("0123456789"), part, None, part))
    monkeypatch.setattr("datasets.load_dataset", no_network)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SOURCES = st.sampled_from(["digits", "cifar100", "pets", "hub", "folder", "train.parquet", ".", "~"])
WORDS = st.sampled_from(["cat", "random-half", "other-half", "shots", "seed", "val", "size", "image", "label"])
SIGNS = st.sampled_from([":", "@", ",", "=", "-", "0", "1", "9" * 30, " ", "\0", "²", "é"])
PIECES = SOURCES | WORDS | SIGNS


@pytest.mark.slow
@settings(max_examples=repetitions("R6"), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PIECES, max_size=8).map("".join) | st.text(st.characters(exclude_characters="/"), max_size=20))
@example("pets:cat,dog@shots=1")
@example("pets/train.parquet")
@example("x" * 5000)
def test_any_text_gives_a_task_or_an_error_that_a_user_can_fix(small_world, text):
    try:
        task = load_task(text, data_root=small_world)
    except RefilledError:
        return
    assert len(task.classes) >= 2
