"""Balanced cross-entropy: equal to the plain one on equal classes, and what it says it is on others."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from refilled.errors import MethodError
from refilled.losses import BalancedCrossEntropyLoss
from refilled.losses.imbalance import counts_of

LOGITS = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0] * 8 + [1] * 3 + [2])


@pytest.mark.parametrize("balance", ["weights", "logits"])
def test_on_equal_classes_it_is_cross_entropy(balance):
    labels = torch.arange(12) % 3
    loss = BalancedCrossEntropyLoss(counts_of(labels, 3), balance)
    torch.testing.assert_close(loss(LOGITS, labels), F.cross_entropy(LOGITS, labels))


def test_weights_are_those_of_scikit_learn():
    weights = torch.from_numpy(compute_class_weight("balanced", classes=np.arange(3), y=LABELS.numpy()))
    each = F.cross_entropy(LOGITS, LABELS, reduction="none")
    loss = BalancedCrossEntropyLoss(counts_of(LABELS, 3), "weights")
    torch.testing.assert_close(loss(LOGITS, LABELS), (weights[LABELS] * each).mean())


def test_logits_that_fit_only_the_frequencies_become_equal():
    """The best constant logits are the log shares without the adjustment, and equal ones with it."""
    loss = BalancedCrossEntropyLoss(counts_of(LABELS, 3), "logits")
    constant = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(constant.expand(12, 3), LABELS), constant)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("balance", ["weights", "logits"])
def test_a_class_without_images_keeps_the_loss_finite(balance):
    loss = BalancedCrossEntropyLoss(torch.tensor([5, 0, 2]), balance)
    assert torch.isfinite(loss(LOGITS, LABELS))


def test_unlabelled_images_are_not_counted():
    assert counts_of(torch.tensor([0, -1, 2, 2, -1]), 4).tolist() == [1, 0, 2, 0]


def test_an_unknown_kind_is_refused():
    with pytest.raises(MethodError, match="'weights' or 'logits'"):
        BalancedCrossEntropyLoss(torch.ones(2), "sampler")
