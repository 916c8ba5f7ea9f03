"""A run's configuration is plain data: it goes to TOML and back, and what is wrong in it is explained."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from refilled.config import Run
from refilled.errors import RefilledError, RunError
from refilled.presets import PRESETS, with_preset

FULL = Run(
    task="cifar100:50-99",
    student="wrn_16_1",
    teacher="runs/a teacher/ü",
    method="refilled",
    settings={"temperature": 2.0, "normalize": True, "centers": "global"},
    shots=50,
    teacher_mean=(0.1, 0.2, 0.3),
    teacher_std=(1.0, 1.0, 1.0),
)


def test_a_run_goes_to_toml_and_back():
    assert Run.from_toml(FULL.to_toml()) == FULL


@pytest.mark.slow
@given(
    st.text(),
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,9}", fullmatch=True), st.text() | st.booleans() | st.floats(allow_nan=False)
    ),
)
def test_any_text_survives_toml(task, settings):
    run = replace(FULL, task=task, settings=settings)
    assert Run.from_toml(run.to_toml()) == run


@settings(deadline=None)  # the first call loads pydantic's schema
@given(st.text() | st.from_regex(r"(student|epochs|lr|seed|settings) = (1|-1|'a'|true|\[\]|nan)", fullmatch=True))
def test_any_other_text_is_refused_with_a_user_error(text):
    assume("task" not in text)  # the one key that a run must have
    with pytest.raises(RefilledError):
        Run.from_toml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('task = "a"\nstudent = "b"\nepoch = 3', "unknown key 'epoch'; did you mean 'epochs'"),
        ('task = "a"\nstudent = "b"\nepochs = "three"', "epochs: "),
        ('student = "b"', "task: "),
        ('task = "a"\nstudent = "b"\nepochs = 0', "epochs = 0 is out of range"),
        ('task = "a"\nstudent = "b"\nlr = nan', "lr = nan is out of range"),
    ],
)
def test_a_mistake_is_named(text, message):
    with pytest.raises(RunError, match=message):
        Run.from_toml(text)


def test_presets_are_valid_runs():
    for values in PRESETS.values():
        Run(task="digits", student="wrn_10_1", **values)


def test_class_means_are_refined_by_unlabelled_images_of_the_same_classes_only():
    assert with_preset("good", {"unlabelled": "rest"})["settings"]["kd_refine"] == 3
    assert "kd_refine" not in with_preset("good", {"unlabelled": "heap/"})["settings"]
    assert "kd_refine" not in with_preset("good", {})["settings"]
    assert with_preset("good", {"unlabelled": "rest", "settings": {"kd_refine": 0}})["settings"]["kd_refine"] == 0
    assert not with_preset("paper", {"unlabelled": "rest"})["settings"]


def test_what_is_given_wins_over_the_preset_and_joins_its_settings():
    good = PRESETS["good"]["settings"]
    assert with_preset(None, {"epochs": 3}) == {"epochs": 3}
    assert with_preset("good", {}) == PRESETS["good"]
    joined = with_preset("good", {"epochs": 3, "settings": {"kd_temperature": 0.1}})
    assert joined == {"method": "refilled", "guard": True, "epochs": 3, "settings": {**good, "kd_temperature": 0.1}}
    assert with_preset("good", {"method": "rkd"}) == {"method": "rkd"}
    assert with_preset("good", {"method": "rkd", "settings": {"weight": 1}})["settings"] == {"weight": 1}
    with pytest.raises(RunError, match=r"preset 'goood'.*good"):
        with_preset("goood", {})


def test_few_images_are_repeated_more_often():
    run = replace(FULL, epochs=10, batch_size=64, least_steps=1000)
    assert run.epochs_over(64000) == 10
    assert run.epochs_over(65) == 500  # in two batches
    assert run.epochs_over(5) == 1000
    assert replace(run, least_steps=0).epochs_over(5) == 10
