"""Heads that are trained before the student is: against a plain loop, and exact when a run is continued."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from refilled.config import Run
from refilled.methods import list_methods, load_method
from refilled.models import create_model
from refilled.runs.prepared import Prepared, resolve
from refilled.runs.teacher_caches import fabric_of
from refilled.stages import Stage, Term
from refilled.training.distributed import ALONE
from refilled.training.evaluation import embed
from refilled.training.heads import terms_with_heads, train_heads
from refilled.training.loop import Journal, fit
from stopping import check_continues_exactly

QUICK = Run(task="digits:5-9", student="wrn_10_1", epochs=2, batch_size=20, shots=8, threads=1, precision="32-true")
STAGED = [name for name in list_methods() if name not in ("fine_tune", "linear_probe", "nearest_neighbour", "svm")]


class Nothing(Journal):
    """A journal that keeps nothing."""


def trained(run: Run) -> Prepared:
    prepared = Prepared(resolve(run))
    fabric = fabric_of(prepared.run)
    fit(prepared.student, prepared.teachers, prepared.task, prepared.stages, prepared.run, fabric, Nothing())
    return prepared


def test_they_are_those_of_a_plain_loop():
    torch.manual_seed(0)
    student = create_model("wrn_10_1", 3, image_size=8)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    embedding, labels = torch.randn(10, student.embedding_dim), torch.arange(10) % 3
    expected = nn.Linear(student.embedding_dim, 3)
    expected.load_state_dict(student.classifier.state_dict())
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-3)
    batches = [torch.tensor([0, 3, 5, 7]), torch.tensor([1, 2, 9]), torch.tensor([4, 6, 8])]
    for step in range(7):  # the epochs follow one another
        rows = batches[step % 3] if step < 6 else batches[2]
        loss = nn.functional.cross_entropy(expected(embedding[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    stage = Stage("classifier", {"ce": Term(nn.CrossEntropyLoss())})
    train_heads(
        student, stage, 7, embedding, [], labels, 10, lambda epoch: batches if epoch < 2 else batches[::-1], ALONE
    )
    torch.testing.assert_close(student.classifier.weight, expected.weight)
    torch.testing.assert_close(student.classifier.bias, expected.bias)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("method", STAGED)
def test_every_method_can_begin_with_its_heads(method, teacher):
    """At a rate of almost 0, all that a run learns is the heads, and the classifier is then better than at random."""
    names = load_method(method)
    run = replace(QUICK, method=method, teacher=None if names.ignores_teacher else teacher, lr=1e-9, epochs=6)
    if method in ("kd", "dkd", "kd_vid"):
        pytest.skip("it needs a teacher of the same classes")
    before, after = (trained(replace(run, head_steps=steps)) for steps in (0, 200))
    images, labels = after.task.train.pixels, after.task.train.labels
    right = [
        (each.student.classifier(embed(each.student, images)).argmax(1) == labels).double().mean().item()
        for each in (before, after)
    ]
    assert right[1] > right[0] + 0.1, right


def test_a_loss_of_feature_maps_or_without_weights_has_no_head(teacher):
    stages = Prepared(resolve(replace(QUICK, method="fitnet", teacher=teacher))).stages
    assert all("features" not in (term.student, term.teacher) for s in stages for term in terms_with_heads(s).values())
    alignment = Prepared(resolve(replace(QUICK, method="refilled", teacher=teacher))).stages[0]
    assert not terms_with_heads(alignment)


@pytest.mark.slow
def test_a_stopped_run_continues_exactly(teacher, tmp_path):
    changes = {"optimizer": "adamw", "lr": 1e-3, "ema": 0.9, "settings": {"regression_weight": 1.0}, "epochs": 4}
    run = replace(QUICK, method="refilled", teacher=teacher, head_steps=5, **changes)
    check_continues_exactly(run, tmp_path, (1, 4, 5, 7))  # two steps per epoch, two epochs per stage


def test_the_average_begins_at_the_trained_heads():
    run = replace(QUICK, ema=0.999, lr=1e-9, head_steps=50)
    averaged, plain = trained(run), trained(replace(run, ema=0.0))
    torch.testing.assert_close(averaged.student.classifier.weight, plain.student.classifier.weight)
