"""Classes of unequal size: what ``balance`` changes in a run."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from refilled.config import Run
from refilled.errors import RunError
from refilled.losses import BalancedCrossEntropyLoss
from refilled.runs.prepared import Prepared, resolve

RUN = Run(task="digits:5-9", student="wrn_10_1", method="vanilla", epochs=1, threads=1, val=0.0)


def test_cross_entropy_is_balanced_by_the_training_images_alone():
    prepared = Prepared(resolve(replace(RUN, balance="logits", shots=7)))
    (stage,) = prepared.stages
    loss = stage.terms["ce"].loss
    assert isinstance(loss, BalancedCrossEntropyLoss)
    assert loss.counts.tolist() == [7] * 5
    (plain,) = Prepared(resolve(RUN)).stages
    assert type(plain.terms["ce"].loss) is nn.CrossEntropyLoss


@pytest.mark.slow
def test_other_terms_and_the_initial_weights_stay(teacher):
    run = replace(RUN, method="rkd", teacher=teacher)
    plain, balanced = (Prepared(resolve(replace(run, balance=balance))) for balance in ("off", "weights"))
    for one, other in zip(plain.stages, balanced.stages, strict=True):
        kinds = [{name: type(term.loss) for name, term in stage.terms.items()} for stage in (one, other)]
        changed = {name for name in kinds[0] if kinds[0][name] is not kinds[1][name]}
        assert changed == {name for name in kinds[0] if name == "ce"}
    for one, other in zip(plain.student.parameters(), balanced.student.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_method_without_cross_entropy_refuses(teacher):
    with pytest.raises(RunError, match="'svm' has no cross-entropy to balance; leave out --balance"):
        Prepared(resolve(replace(RUN, method="svm", teacher=teacher, balance="logits")))
