"""Losses of images without labels, against slow references."""

import math

import pytest
import torch
import torch.nn.functional as F

from refilled.errors import MethodError
from refilled.losses import LocalKDLoss, Trusted
from refilled.losses.local_kd import local_kd
from refilled.methods.self_training import PseudoLabelLoss
from refilled.stages import Term

KNOWN = 12


def batch(classes: int = 4, count: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, embedding = (torch.randn(count, width, generator=generator) for width in (classes, 6))
    labels = torch.arange(count) % classes
    labels[KNOWN:] = -1
    return logits, embedding, labels


@pytest.mark.parametrize("doubt", [0.0, 2.0])
@pytest.mark.parametrize("right_only", [False, True])
def test_local_kd_compares_an_unlabelled_image_with_all_classes(doubt, right_only):
    logits, embedding, labels = batch()
    loss = LocalKDLoss(centers="global", temperature=0.7, doubt=doubt, right_only=right_only)
    loss.precompute(embedding, labels)
    known = loss(logits[:KNOWN], embedding[:KNOWN], labels[:KNOWN]).item()
    others = 0.0
    for row in range(KNOWN, len(labels)):
        q = F.softmax(-(embedding[row] - loss.class_centers).square().sum(1) / 0.7, 0)
        p = F.softmax(logits[row], 0)
        sure = 1 + sum(x * math.log(x) for x in q.tolist()) / math.log(4)
        others += sure**doubt * sum(q[c] * (q[c] / p[c]).log() for c in range(4)).item()
    expected = (KNOWN * known + others) / len(labels)
    assert loss(logits, embedding, labels).item() == pytest.approx(expected, rel=1e-4)


def test_batches_of_unlabelled_images_alone_are_enough():
    logits, embedding, labels = batch()
    loss = LocalKDLoss(centers="global")
    loss.precompute(embedding, labels)
    assert loss(logits[KNOWN:], embedding[KNOWN:], labels[KNOWN:]).isfinite()


def test_class_means_are_of_labelled_images_and_the_mean_of_all():
    _, embedding, labels = batch()
    loss = LocalKDLoss(centers="global", centered=True)
    loss.precompute(embedding, labels)
    assert torch.allclose(loss.mean, embedding.mean(0))
    own = (embedding - embedding.mean(0))[:KNOWN][labels[:KNOWN] == 2].mean(0)
    assert torch.allclose(loss.class_centers[2], own, atol=1e-6)


def test_refined_means_come_nearer_to_those_of_all_images():
    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(300) % 3
    embedding = 4 * torch.eye(3)[truth] + torch.randn(300, 3, generator=generator)
    labels = truth.clone()
    labels[3:] = -1
    every = torch.stack([embedding[truth == c].mean(0) for c in range(3)])
    gaps = []
    for refine in (0, 3):
        loss = LocalKDLoss(centers="global", refine=refine)
        loss.precompute(embedding, labels)
        gaps.append((loss.class_centers - every).norm().item())
    assert gaps[1] < 0.5 * gaps[0]


def test_refined_means_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(2)
    embedding, labels = torch.randn(40, 6, generator=generator), torch.full((40,), -1)
    labels[:8] = torch.arange(8) % 4
    means = [embedding[labels == c].mean(0) for c in range(4)]
    for _ in range(2):
        sums, weights = [torch.zeros(6) for _ in range(4)], [0.0] * 4
        shares = []
        for row in embedding[8:]:
            unnormalised = [math.exp(-(row - mean).square().sum().item() / (0.25 * 2.0)) for mean in means]
            shares.append([value / sum(unnormalised) for value in unnormalised])
        for c in range(4):
            for row in embedding[labels == c]:
                sums[c], weights[c] = sums[c] + row, weights[c] + 1
            for row, share in zip(embedding[8:], shares, strict=True):
                sums[c], weights[c] = sums[c] + share[c] * max(share) * row, weights[c] + share[c] * max(share)
        means = [total / weight for total, weight in zip(sums, weights, strict=True)]
    loss = LocalKDLoss(centers="global", temperature=2.0, refine=2)
    loss.precompute(embedding, labels)
    torch.testing.assert_close(loss.class_centers, torch.stack(means), atol=1e-5, rtol=1e-5)


def test_trust_is_measured_on_labelled_images():
    _, embedding, labels = batch()
    shares = []
    for shown in (KNOWN, len(labels)):
        trusted = Trusted(LocalKDLoss(centers="global"), worth=5.0)
        trusted.precompute(embedding[:shown], labels[:shown])
        shares.append((trusted.share.item(), trusted.prior.item()))
    assert shares[0] == shares[1]
    assert Term(trusted, teacher="embedding").sees_unlabelled


def test_pseudo_labels_are_the_sure_guesses_of_unlabelled_images():
    logits = torch.tensor([[9.0, 0], [9, 0], [0.1, 0], [0, 5]], requires_grad=True)
    labels = torch.tensor([1, -1, -1, -1])
    loss = PseudoLabelLoss(0.9)
    value = loss(logits, labels)
    sure = [-F.log_softmax(logits[1], 0)[0], -F.log_softmax(logits[3], 0)[1]]
    assert value.item() == pytest.approx(sum(sure).item() / 3, rel=1e-5)
    value.backward()
    assert logits.grad[0].abs().max() == 0 == logits.grad[2].abs().max()
    assert loss.statistics()["pseudo_labelled"].item() == pytest.approx(2 / 3)
    assert loss(logits[:1], labels[:1]).item() == 0


def test_bad_parameters_are_refused():
    with pytest.raises(MethodError, match="threshold"):
        PseudoLabelLoss(1.5)
    with pytest.raises(MethodError, match="doubt"):
        LocalKDLoss(doubt=-1)


@pytest.mark.parametrize("average", ["images", "elements"])
@pytest.mark.parametrize("classes", ["all", "batch"])
@pytest.mark.parametrize("right_only", [False, True])
@pytest.mark.parametrize("known", [2, 4])
def test_every_parameter_reaches_labelled_and_unlabelled_images(average, classes, right_only, known):
    logits, embedding, labels = (x.double() if x.is_floating_point() else x for x in batch(known + 1))
    labels = labels.clamp(max=known - 2)  # the last known class is not in the batch, the one after it has no mean
    means = torch.randn(known + 1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    means[known, 0] = torch.nan
    total = 0.0
    for row, label in zip(range(len(labels)), labels.tolist(), strict=True):
        compared = range(known) if label < 0 or classes == "all" else range(known - 1)
        unit = embedding[row] / embedding[row].norm()
        q = F.softmax(torch.stack([-(unit - means[c]).square().sum() / 0.7 for c in compared]), 0)
        p = F.softmax(logits[row, : len(compared)] / 0.6, 0)
        each = sum(q[c] * (q[c] / p[c]).log() for c in compared).item()
        if label < 0:
            each *= (1 + sum(x * math.log(x) for x in q.tolist()) / math.log(known)) ** 1.5
        elif right_only and q.argmax() != label:
            each = 0.0
        total += each / (len(compared) if average == "elements" else 1)
    value = local_kd(
        logits,
        embedding,
        labels,
        temperature=0.7,
        student_temperature=0.6,
        centers=means,
        classes=classes,
        normalize=True,
        right_only=right_only,
        average=average,
        doubt=1.5,
    )
    assert value.item() == pytest.approx(total / len(labels), rel=1e-6)
    loss = LocalKDLoss(
        temperature=0.7,
        student_temperature=0.6,
        centers="global",
        class_centers=means,
        classes=classes,
        normalize=True,
        right_only=right_only,
        average=average,
        doubt=1.5,
    )
    assert loss(logits, embedding, labels) == value


def test_an_image_between_all_classes_has_no_weight_and_one_class_no_doubt():
    for classes in range(1, 40):
        logits = torch.randn(3, classes, generator=torch.Generator().manual_seed(classes))
        means = torch.ones(classes, 6)  # every class is equally near
        value = local_kd(logits, torch.zeros(3, 6), torch.full((3,), -1), centers=means, doubt=0.5)
        assert value.item() == pytest.approx(0, abs=5e-3)


def test_a_batch_of_unlabelled_images_has_weight_one_without_doubt():
    logits, embedding, labels = batch()
    means = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    q, log_p = F.softmax(-(embedding[:, None] - means).square().sum(2) / 2, 1), F.log_softmax(logits, 1)
    expected = (q * (q.log() - log_p)).sum(1)[KNOWN:].mean()
    torch.testing.assert_close(local_kd(logits[KNOWN:], embedding[KNOWN:], labels[KNOWN:], centers=means), expected)


def test_a_centred_loss_is_that_of_the_centred_embedding():
    logits, embedding, labels = batch()
    embedding = embedding + 5
    loss = LocalKDLoss(centers="global", centered=True, normalize=True, temperature=0.5)
    loss.precompute(embedding, labels)
    moved = embedding - embedding.mean(0)
    plain = LocalKDLoss(centers="global", normalize=True, temperature=0.5)
    plain.precompute(moved, labels)
    torch.testing.assert_close(loss(logits, embedding, labels), plain(logits, moved, labels))


def test_an_unsure_teacher_counts_fully_by_default():
    logits, embedding, labels = batch()
    values = []
    for options in ({}, {"doubt": 0.0}, {"doubt": 1.0}):
        loss = LocalKDLoss(centers="global", temperature=5.0, **options)
        loss.precompute(embedding, labels)
        values.append(loss(logits, embedding, labels).item())
    assert values[0] == values[1] != values[2]
