"""The forecast's file, its form, and how it was found."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from refilled.selection.forecast import FILE, Features, Model, fit, load_forecast

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("build_forecast", DOCS / "build_forecast.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_and_the_page_follow_from_the_features(script):
    model, _ = script.forecast()
    assert model == Model.from_json(FILE.read_text())
    page = (DOCS / "teachers.md").read_text()
    assert f"{script.BEGIN}\n{script.table()}\n{script.END}" in page


def test_the_rank_correlation_is_that_of_pairs_in_order(script):
    model, rows = script.forecast()
    assert model.settings == len(rows) >= 15
    guesses, gains = (np.array([row[column] for row in rows]) for column in (3, 2))

    def ranks(values):
        return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])

    assert model.rank_correlation == pytest.approx(np.corrcoef(ranks(guesses), ranks(gains))[0, 1], abs=1e-3)
    assert model.error == pytest.approx(np.sqrt(np.mean((guesses - gains) ** 2)), abs=1e-2)


def test_a_setting_is_forecast_without_its_data_set(script):
    _, rows = script.forecast()
    features, gains = [row[1] for row in rows], [row[2] for row in rows]
    data_sets = [row[0]["data"] for row in rows]
    _, before = fit(features, gains, data_sets)
    changed = [gain + 50 if name == "birds" else gain for gain, name in zip(gains, data_sets, strict=True)]
    _, after = fit(features, changed, data_sets)
    for name, old, new in zip(data_sets, before, after, strict=True):
        if name == "birds":
            assert new == old
        elif old > 0:
            assert new > old


def test_the_gain_rises_with_the_excess_and_falls_with_the_labels():
    model = load_forecast()
    assert model.gain(Features.of(60, 70, 10)) == 0
    assert model.gain(Features.of(80, 10, 10)) > model.gain(Features.of(60, 10, 10)) > 0
    assert model.gain(Features.of(80, 10, 10)) > model.gain(Features.of(80, 10, 100)) > 0
    assert model.extrapolates(Features.of(80, 10, 1))
    assert not model.extrapolates(Features.of(80, 10, 10))


def test_a_known_law_is_recovered():
    features = [Features(excess, labels) for excess in (10, 40, 80) for labels in (2, 10, 50, 400)]
    gains = [0.6 * one.excess / (1 + one.labels_per_class / 31.6) for one in features]
    model, left_out = fit(features, gains, ["a", "b"] * 6)
    assert (model.share, model.worth) == (pytest.approx(0.6, rel=0.02), pytest.approx(31.6, rel=0.03))
    assert left_out == pytest.approx(gains, rel=0.05)
    assert model.rank_correlation > 0.99
