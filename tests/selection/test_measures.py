"""Folds, LogME and the one-standard-error rule, against properties and slow references."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from refilled.data import Split
from refilled.selection.measures import (
    Accuracy,
    folds_of,
    held_out_accuracy,
    linear_probe,
    logme,
    nearest_class_mean,
    smallest_within_one_error,
)


def split_of(pixels, labels):
    return Split(pixels, torch.as_tensor(labels), [str(row) for row in range(len(labels))])


def random_pixels(count, seed=0):
    return torch.randint(256, (count, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_folds_are_stratified_and_never_separate_copies():
    pixels = random_pixels(120)
    pixels[40:60] = pixels[:20]  # copies with the same label and with another one
    pixels[60] = pixels[0]
    folds = folds_of(split_of(pixels, [row % 4 for row in range(120)]))
    assert folds[40:60].equal(folds[:20])
    assert folds[60] == folds[0]
    assert set(folds.tolist()) == set(range(5))
    without_copies = folds_of(split_of(random_pixels(120), [row % 4 for row in range(120)]))
    for number in range(4):
        assert torch.bincount(without_copies[number::4], minlength=5).tolist() == [6] * 5


def test_two_images_per_class_make_two_folds_with_one_image_of_each():
    folds = folds_of(split_of(random_pixels(14), [row // 2 for row in range(14)]))
    assert (folds[::2] + folds[1::2]).tolist() == [1] * 7


@pytest.mark.parametrize("classify", [nearest_class_mean, linear_probe])
def test_held_out_accuracy_knows_signal_from_noise(classify):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    noise = torch.randn(200, 16, generator=generator)
    signal = noise + 6 * torch.eye(16)[labels]
    folds = folds_of(split_of(random_pixels(200), labels))
    assert held_out_accuracy(classify, signal, labels, folds).percent > 97
    at_chance = held_out_accuracy(classify, noise, labels, folds)
    assert at_chance.low < 25 < at_chance.high + 5
    assert at_chance.images == 200


def test_a_label_is_never_used_to_predict_itself():
    seen = []

    def classify(train, labels, held_out):
        seen.append((set(train[:, 0].tolist()), set(held_out[:, 0].tolist())))
        return torch.zeros(len(held_out), dtype=torch.long)

    labels = torch.arange(40) % 2
    held_out_accuracy(classify, torch.arange(40.0)[:, None], labels, folds_of(split_of(random_pixels(40), labels)))
    assert all(not train & held_out for train, held_out in seen)
    assert set.union(*(held_out for _, held_out in seen)) == set(range(40))


def slow_logme(embedding, labels):
    """Maximise the density of y ~ N(0, F F' / alpha + I / beta) by a general optimiser."""
    features, values = embedding.double().numpy(), []
    for number in labels.unique().tolist():
        y = (labels == number).double().numpy()

        def loss(logs, y=y):
            covariance = features @ features.T * math.exp(-logs[0]) + np.eye(len(y)) * math.exp(-logs[1])
            return -multivariate_normal(np.zeros(len(y)), covariance, allow_singular=True).logpdf(y)

        starts = [(0.0, 0.0), (3.0, 1.0), (-3.0, 3.0), (6.0, 2.0)]
        values.append(-min(minimize(loss, start, method="Nelder-Mead", tol=1e-9).fun for start in starts))
    return np.mean(values) / len(labels)


@pytest.mark.slow
@pytest.mark.parametrize(("images", "width", "signal"), [(24, 5, 2.0), (24, 5, 0.5), (12, 30, 1.0), (12, 40, 30.0)])
def test_logme_is_the_largest_evidence(images, width, signal):
    generator = torch.Generator().manual_seed(images + width)
    labels = torch.arange(images) % 3
    embedding = torch.randn(images, width, generator=generator) + signal * torch.eye(width)[labels]
    assert logme(embedding, labels) == pytest.approx(slow_logme(embedding, labels), abs=2e-4)


def test_logme_of_a_useless_embedding_is_finite_and_lower():
    labels = torch.arange(60) % 3
    useful = torch.eye(8)[labels] + 0.1 * torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    zero = logme(torch.zeros(60, 8), labels)
    assert math.isfinite(zero)
    assert zero < logme(useful, labels)


def test_an_interval_is_that_of_wilson():
    found = Accuracy.of(torch.arange(100) < 80)
    center, half = (0.8 + 1.96**2 / 200) / (1 + 1.96**2 / 100), 0.0769
    assert (found.percent, found.images) == (80, 100)
    assert found.low == pytest.approx(100 * (center - half), abs=0.1)
    assert found.high == pytest.approx(100 * (center + half), abs=0.1)


def test_the_smallest_size_within_one_error_of_the_best():
    accuracies = [Accuracy(percent, 0, 0, 400) for percent in (70.0, 78.5, 80.0, 79.0)]  # an error of 2 points
    assert smallest_within_one_error([96, 128, 160, 224], accuracies) == 128
    assert smallest_within_one_error([96, 128], accuracies[:2]) == 128
