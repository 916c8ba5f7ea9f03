"""Scores of a model, found batch by batch, against the formula on all outputs at once."""

import pytest
import torch
from torch import nn

from refilled.data import Split
from refilled.models import Backbone, create_model
from refilled.training.evaluation import (
    accuracy,
    class_accuracies,
    embed,
    forward_in_parts,
    nearest_center_accuracy,
    outputs_by_batch,
    predict,
    predict_classes,
    predict_classes_twice,
)

CLASSES, WIDTH = 5, 3


class Averages(Backbone):
    """The mean of each channel is all that it sees."""

    def __init__(self):
        super().__init__(WIDTH, (), CLASSES)

    def embed(self, images):
        return images.mean((2, 3)), ()


@pytest.fixture
def model() -> Averages:
    torch.manual_seed(0)
    return Averages()


def split(images: int) -> Split:
    pixels = torch.randint(256, (images, 3, 4, 4), dtype=torch.uint8)
    return Split(pixels, torch.randint(CLASSES, (images,)), ("",) * images)


@pytest.mark.parametrize("images", [1, 255, 257, 600])  # less than a batch, and several
def test_classes_are_those_of_all_outputs_at_once(model, images):
    train, scored = split(images), split(300)
    whole = predict(model, scored.pixels)
    by_logit, by_mean = predict_classes_twice(model, train, scored.pixels)
    assert torch.equal(by_logit, whole.logits.argmax(1))
    assert torch.equal(by_logit, predict_classes(model, scored.pixels))
    expected = nearest_center_accuracy(embed(model, train.pixels), train.labels, whole.embedding, scored.labels)
    assert accuracy(by_mean, scored.labels) == expected


def test_outputs_come_in_batches_and_only_those_that_are_asked_for(model):
    batches = list(outputs_by_batch(model, split(600).pixels, parts=("embedding",)))
    assert [batch.embedding.shape for batch in batches] == [(256, WIDTH), (256, WIDTH), (88, WIDTH)]
    assert all(batch.logits.shape == (len(batch.embedding), 0) for batch in batches)


def test_large_images_go_through_in_parts_with_the_same_outputs():
    model = create_model("mobilenet_0.25", 5, image_size=224).eval()
    images = torch.randint(256, (23, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        parts, whole = forward_in_parts(model, images), model(images)
    torch.testing.assert_close(parts.logits, whole.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.embedding, whole.embedding, atol=1e-5, rtol=1e-5)


def test_no_images_give_outputs_of_the_right_width(model):
    found = predict(model, split(0).pixels)
    assert found.logits.shape == (0, CLASSES)
    assert found.embedding.shape == (0, WIDTH)
    assert predict_classes(model, split(0).pixels).shape == (0,)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_asked_in_evaluation_mode_and_left_as_it_was(model, training):
    model.body = nn.BatchNorm1d(WIDTH).train(training)
    model.train(training)
    assert not any(model.training for _ in outputs_by_batch(model, split(3).pixels))
    assert model.training == training


def test_accuracies_count_the_classes_that_were_found():
    found, labels = torch.tensor([0, 1, 1, 3]), torch.tensor([0, 1, 0, 1])
    assert accuracy(found, labels) == 50
    assert class_accuracies(found, labels, 3)[:2] == [50, 50]
    assert class_accuracies(found, labels, 3)[2] != class_accuracies(found, labels, 3)[2]  # NaN: no images of it
