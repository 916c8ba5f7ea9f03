"""How far to trust a teacher: against a loop, and on embeddings whose worth is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refilled.errors import MethodError
from refilled.losses.local_kd import LocalKDLoss, LogitKDLoss
from refilled.losses.trust import Trusted, held_out_information, is_at_chance, knows_less, label_information


def embeddings(classes: int, each: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes around random points, ``spread`` wide; with 0 they are the points."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each)
    points = torch.randn(classes, 16, generator=generator, dtype=torch.float64)
    return points[labels] + spread * torch.randn(len(labels), 16, generator=generator, dtype=torch.float64), labels


def slow_label_information(embedding: torch.Tensor, labels: torch.Tensor) -> float:
    rows = F.normalize(embedding - embedding.mean(0), dim=1)
    best = math.inf
    squared = torch.zeros(len(rows), labels.unique().numel(), dtype=rows.dtype)
    targets = torch.zeros(len(rows), dtype=torch.int64)
    for i in range(len(rows)):
        others = torch.arange(len(rows)) != i
        for index, c in enumerate(labels.unique()):
            squared[i, index] = (rows[i] - rows[others & (labels == c)].mean(0)).square().sum()
            targets[i] = index if labels[i] == c else targets[i]
    for step in range(14):
        best = min(best, F.cross_entropy(-squared / (0.02 * 2 ** (step / 2)), targets).item())
    return max(0.0, 1 - best / math.log(labels.unique().numel()))


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_label_information_agrees_with_a_loop(spread):
    embedding, labels = embeddings(4, 5, spread)
    labels = labels * 7 + 3  # any ids
    assert label_information(embedding, labels) == pytest.approx(slow_label_information(embedding, labels), abs=1e-9)


def test_the_temperature_is_sought_up_to_the_highest_and_no_further():
    embedding, labels = embeddings(3, 40, 6.0)
    share = label_information(embedding, labels)
    assert share == pytest.approx(slow_label_information(embedding, labels), abs=1e-9)
    assert 0 < share < 0.2


def test_the_less_classes_overlap_the_more_an_embedding_knows():
    shares = [label_information(*embeddings(10, 20, spread)) for spread in (0.0, 0.3, 1.0, 3.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99
    noise = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    assert label_information(noise, torch.arange(10).repeat(40)) < 0.02


def test_label_information_does_not_see_scale_position_and_direction():
    embedding, labels = embeddings(5, 10, 1.0)
    turn, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    moved = 7 * embedding @ turn + 3
    assert label_information(moved, labels) == pytest.approx(label_information(embedding, labels), abs=1e-9)


def test_an_image_does_not_vouch_for_itself():
    """Two images per class of pure noise in many dimensions, which their own means would seem to separate."""
    noise = torch.randn(200, 500, generator=torch.Generator().manual_seed(3))
    assert label_information(noise, torch.arange(100).repeat(2)) == 0  # not negative


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 2]])
def test_nothing_is_known_without_two_classes_of_two_images(labels):
    assert label_information(torch.randn(4, 3), torch.tensor(labels)) == 0.0


def test_a_trusted_loss_is_the_loss_times_the_share_to_a_power():
    embedding, labels = embeddings(4, 8, 3.0)
    embedding = embedding.float()
    logits = torch.randn(32, 4, requires_grad=True)
    plain = LocalKDLoss(centers="global", normalize=True, centered=True)
    plain.precompute(embedding, labels)
    share = label_information(embedding, labels)
    assert 0.1 < share < 0.9
    for power in (0.0, 1.0, 2.0):
        loss = Trusted(LocalKDLoss(centers="global", normalize=True, centered=True), power)
        loss.precompute(embedding, labels)
        torch.testing.assert_close(loss(logits, embedding, labels), share**power * plain(logits, embedding, labels))
        assert loss.statistics()["label_information"].item() == pytest.approx(share)
        again = Trusted(LocalKDLoss(centers="global", normalize=True, centered=True), power)
        again.load_state_dict(loss.state_dict())  # as a resumed run does
        torch.testing.assert_close(again(logits, embedding, labels), loss(logits, embedding, labels))


def test_a_teacher_counts_as_much_as_this_many_images_per_class():
    embedding, labels = embeddings(4, 8, 3.0)
    embedding = embedding.float()
    logits = torch.randn(32, 4)

    def value(worth):
        loss = Trusted(LocalKDLoss(centers="global"), worth=worth)
        loss.precompute(embedding, labels)
        again = Trusted(LocalKDLoss(centers="global"), worth=worth)
        again.load_state_dict(loss.state_dict())
        torch.testing.assert_close(again(logits, embedding, labels), loss(logits, embedding, labels))
        return loss(logits, embedding, labels).item()

    share = label_information(embedding, labels)
    enough = 8 * (1 - share) / share  # it is then worth the 8 images that there are
    assert value(1.01 * enough) == value(100 * enough) == value(None)
    for part in (0.5, 0.1):
        assert value(part * enough) == pytest.approx(part * value(None), rel=1e-5)


def test_trust_must_be_measured_and_its_power_make_sense():
    with pytest.raises(MethodError, match="call precompute"):
        Trusted(nn.MSELoss())(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(MethodError, match="trust must be 0 or more"):
        Trusted(nn.MSELoss(), -1.0)
    with pytest.raises(MethodError, match="worth must be greater than 0"):
        Trusted(nn.MSELoss(), worth=0.0)


def test_held_out_information_agrees_with_a_loop():
    embedding, labels = embeddings(4, 9, 2.0)
    train, held_out = torch.arange(36) % 3 > 0, torch.arange(36) % 3 == 0
    mean = embedding[train].mean(0)
    rows = F.normalize(embedding - mean, dim=1)
    means = torch.stack([rows[train & (labels == c)].mean(0) for c in range(4)])
    best = math.inf
    for step in range(14):
        scores = -torch.stack([(rows[held_out] - m).square().sum(1) for m in means], 1) / (0.02 * 2 ** (step / 2))
        best = min(best, F.cross_entropy(scores, labels[held_out]).item())
    found = held_out_information(embedding[train], labels[train], embedding[held_out], labels[held_out])
    assert found == pytest.approx(1 - best / math.log(4), abs=1e-9)


def test_an_embedding_that_memorized_images_knows_nothing_about_others():
    embedding, labels = embeddings(5, 20, 0.1)
    noise = torch.randn(100, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert label_information(embedding, labels) > 0.9
    assert held_out_information(embedding, labels, embedding, labels) > 0.9
    assert is_at_chance(lambda order: held_out_information(embedding, labels, noise, order), labels)
    assert not is_at_chance(lambda order: held_out_information(embedding, labels, embedding, order), labels)


def test_which_of_two_embeddings_knows_less_needs_evidence():
    good, labels = embeddings(5, 20, 0.5)
    poor = good + 8 * torch.randn(good.shape, generator=torch.Generator().manual_seed(1), dtype=good.dtype)
    assert knows_less(poor, good, labels)
    assert not knows_less(good, poor, labels)
    assert not knows_less(good, good, labels)
    few = torch.tensor([0, 1, 20, 21])
    assert not knows_less(poor[few], poor[few].flip(1) + 0.01, labels[few])  # a difference that is mere chance
    assert knows_less(poor, good, torch.arange(100)) is False  # no class has two images


def test_a_constant_embedding_is_at_chance_and_knows_less_than_any_other():
    good, labels = embeddings(5, 20, 0.5)
    constant = torch.ones(100, 3)
    assert is_at_chance(lambda order: label_information(constant, order), labels)
    assert knows_less(constant, good, labels)


def test_a_difference_counts_from_the_level_of_five_percent(monkeypatch):
    noise = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    for z, less in ((1.6, False), (1.7, True)):
        losses = {"poor": 5 * (noise + z / 10), "good": torch.zeros(100, dtype=torch.float64)}
        monkeypatch.setattr("refilled.losses.trust._leave_one_out_losses", lambda name, _, known=losses: known[name])
        assert knows_less("poor", "good", None) is less


def test_chance_is_measured_on_nineteen_shuffles_that_are_always_the_same():
    labels, seen = torch.arange(50), []

    def information(order):
        seen.append(order.tolist())
        return 1.0 if len(seen) in (1, 25) else 0.5 if len(seen) <= 20 else 1.0

    assert not is_at_chance(information, labels)
    assert is_at_chance(information, labels)
    assert len(seen) == 40
    assert seen[:20] == seen[20:]
    assert seen[0] == labels.tolist()
    assert all(sorted(order) == seen[0] != order for order in seen[1:20])


def test_one_good_shuffle_is_enough_for_chance():
    values = iter([0.5] + 18 * [0.0] + [0.6])
    assert is_at_chance(lambda order: next(values), torch.arange(5))


def test_a_teacher_that_knows_all_labels_is_worth_any_number_of_images():
    embedding, labels = embeddings(4, 8, 0.0)
    loss = Trusted(LocalKDLoss(centers="global"), worth=0.01)
    loss.precompute(embedding.float(), labels)
    assert loss.statistics() == {"label_information": 1.0, "prior": 1.0}


def test_the_prior_is_that_of_its_formula():
    embedding, labels = embeddings(4, 8, 3.0)
    loss = Trusted(LocalKDLoss(centers="global"), worth=0.5)
    every = torch.cat([embedding, embedding[:3] + 9]), torch.cat([labels, torch.full((3,), -1)])
    loss.precompute(*every)
    share = label_information(embedding, labels)
    assert loss.statistics()["label_information"].item() == pytest.approx(share)
    assert loss.statistics()["prior"].item() == pytest.approx(0.5 * share / (1 - share) / 8)
    plain = Trusted(LocalKDLoss(centers="global"))
    plain.precompute(*every)
    assert plain.power == 1.0
    assert list(plain.statistics()) == ["label_information"]


def test_a_trusted_loss_reads_what_its_loss_reads():
    assert Trusted(nn.MSELoss()).reads_labels
    assert not Trusted(nn.MSELoss()).sees_unlabelled
    assert not Trusted(LogitKDLoss()).reads_labels
    assert Trusted(LogitKDLoss()).sees_unlabelled
    assert Trusted.needs_training_set
    with pytest.raises(MethodError, match=r"trust must be 0 or more, but is -0\.5"):
        Trusted(nn.MSELoss(), -0.5)


def test_shapes_that_do_not_fit_are_refused():
    embedding, labels = embeddings(4, 2, 1.0)
    for call in (
        lambda: label_information(embedding, labels[1:]),
        lambda: held_out_information(embedding, labels[1:], embedding, labels),
        lambda: held_out_information(embedding, labels, embedding, labels[1:]),
    ):
        with pytest.raises(MethodError, match=r"\(8, 16\) with labels \(7,\)"):
            call()


def test_the_only_image_of_a_class_is_left_out():
    embedding, labels = embeddings(2, 8, 0.1)
    share = label_information(embedding, labels)
    assert share > 0.9
    more = torch.cat([embedding, 3 * embedding[:1]]), torch.cat([labels, torch.tensor([99])])
    assert label_information(*more) == pytest.approx(share, rel=1e-9)


def test_classes_of_two_images_count_and_lone_images_do_not():
    embedding = 10 * torch.eye(4)[[0, 0, 1, 1, 2, 2]] + 0.1 * torch.arange(24.0).view(6, 4).sin()
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    known = label_information(embedding, labels)
    assert known > 0.9
    centred = embedding - embedding.mean(0)
    with_lone = torch.cat([centred, torch.zeros(1, 4)])  # at the mean, which it therefore does not move
    assert label_information(with_lone, torch.tensor([0, 0, 1, 1, 2, 2, 3])) == pytest.approx(known, abs=1e-5)
