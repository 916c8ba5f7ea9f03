import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import Tensor

import reference
from refilled.errors import MethodError
from refilled.losses.distances import class_centers, pair_distances, pairwise_distances, squared_distances, unit_rows
from refilled.losses.mining import Triplets, all_semi_hard_triplets, same_class_pairs, semi_hard_triplets

few = settings(max_examples=min(40, settings().max_examples), deadline=None)
batches = st.tuples(st.lists(st.sampled_from([-3, 0, 1, 7, 10**12]), min_size=1, max_size=24), st.integers(0, 2**32))


def draw(batch: tuple[list[int], int], dim: int = 5) -> tuple[Tensor, Tensor]:
    labels, seed = batch
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(labels), dim, generator=generator, dtype=torch.float64), torch.tensor(labels)


def as_set(triplets: Triplets) -> set[tuple[int, ...]]:
    listed = list(zip(*(column.tolist() for column in triplets), strict=True))
    assert len(set(listed)) == len(listed)
    return set(listed)


@few
@given(batches)
def test_nearest_impostors_equal_those_of_the_loop(batch):
    x, labels = draw(batch)
    assert as_set(semi_hard_triplets(x, labels)) == reference.nearest_triplets(x.tolist(), labels.tolist())


@few
@given(batches, st.floats(0.01, 2))
def test_all_impostors_are_those_of_the_loop(batch, margin):
    x, labels = draw(batch)
    mined = as_set(all_semi_hard_triplets(x, labels, margin=margin))
    assert mined == reference.all_triplets(x.tolist(), labels.tolist(), margin)


@pytest.mark.parametrize("size", [31, 64, 200])
def test_all_impostors_equal_those_of_a_general_miner(size):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(12, (size,), generator=generator)
    peer = TripletMarginMiner(margin=0.2, type_of_triplets="semihard")(x, labels)
    assert as_set(all_semi_hard_triplets(x, labels, margin=0.2)) == as_set(Triplets(*peer))


@pytest.mark.parametrize("size", [100, 333])
def test_float32_batches_cut_into_parts_agree_with_a_mask_over_all_triples(size, monkeypatch):
    monkeypatch.setattr("refilled.losses.mining.CACHE", 1000)
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 16, generator=generator)
    labels = torch.randint(10, (size,), generator=generator)
    d = squared_distances(unit_rows(x))
    same = labels[:, None] == labels
    impostor = ~same[:, None] & (d[:, None] > d[:, :, None])  # (N, N, N)
    nearest = d[:, None].where(impostor, torch.inf).min(2)
    anchor, positive = (same.fill_diagonal_(False) & nearest.values.isfinite()).nonzero(as_tuple=True)
    expected = Triplets(anchor, positive, nearest.indices[anchor, positive])
    assert as_set(semi_hard_triplets(x, labels)) == as_set(expected)


@few
@given(batches, st.floats(0.1, 10))
def test_mining_ignores_order_rotation_and_scale(batch, scale):
    x, labels = draw(batch)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(batch[1]))
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    mined = as_set(semi_hard_triplets((scale * x @ rotation)[order], labels[order]))
    assert {tuple(order[list(t)].tolist()) for t in mined} == as_set(semi_hard_triplets(x, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_mined_in_single(dtype):
    x, labels = draw(([0, 0, 1, 1, 2, 2] * 3, 0))
    x = x.to(dtype)
    assert as_set(semi_hard_triplets(x, labels)) == as_set(semi_hard_triplets(x.float(), labels))
    with torch.autocast("cpu"):
        assert as_set(semi_hard_triplets(x, labels)) == as_set(semi_hard_triplets(x.float(), labels))


@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        ([[1.0, 0.0]], [3]),
        ([[1.0, 0.0], [0.0, 1.0]], [0, 1]),
        ([[1.0, 0.0], [0.0, 1.0]], [5, 5]),
        ([[0.0, 0.0]] * 4, [0, 0, 1, 1]),
        ([[2.0, 0.0]] * 4, [0, 0, 1, 1]),
    ],
    ids=["one image", "no pair", "one class", "zeros", "identical"],
)
def test_batches_without_triplets_give_an_empty_result(rows, labels):
    for mined in (semi_hard_triplets, all_semi_hard_triplets):
        triplets = mined(torch.tensor(rows), torch.tensor(labels))
        assert [column.shape for column in triplets] == [(0,)] * 3
        assert {column.dtype for column in triplets} == {torch.int64}


def test_pairs_are_all_of_one_class():
    labels = torch.tensor([4, 2, 4, 4, 9, 2])
    pairs = set(zip(*(column.tolist() for column in same_class_pairs(labels)), strict=True))
    assert pairs == {(0, 2), (0, 3), (2, 0), (2, 3), (3, 0), (3, 2), (1, 5), (5, 1)}


@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (4,), (4, 2, 2)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(MethodError, match=r"labels \(4,\)|labels \(0,\)"):
        semi_hard_triplets(torch.zeros(shape), torch.zeros(min(shape[0], 4), dtype=torch.int64))


def test_distances_are_euclidean_and_differentiable_where_rows_coincide():
    a, b = torch.randn(7, 3, dtype=torch.float64) + 100, torch.randn(4, 3, dtype=torch.float64) + 100
    torch.testing.assert_close(pairwise_distances(a, b), torch.cdist(a, b), rtol=1e-12, atol=0)
    torch.testing.assert_close(pairwise_distances(a), pairwise_distances(a, a), rtol=0, atol=1e-6)
    assert pairwise_distances(a).diagonal().eq(0).all()
    rows, columns = torch.tensor([[0, 3, 6, 2], [1, 3, 0, 5]])
    expected = pairwise_distances(a)[rows, columns]
    torch.testing.assert_close(pair_distances(a - 100, rows, columns), expected, rtol=1e-9, atol=1e-6)

    same = torch.ones(3, 2, requires_grad=True)
    pairwise_distances(same).sum().backward()
    assert same.grad.eq(0).all()


def test_distance_gradients():
    a = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pairwise_distances, (a,))
    assert torch.autograd.gradcheck(pairwise_distances, (a, b))
    assert torch.autograd.gradcheck(unit_rows, (a,))


def test_a_row_of_zeros_has_no_direction_and_no_gradient():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    unit = unit_rows(x)
    assert unit.tolist() == [[0, 0], pytest.approx([0.6, 0.8])]
    unit.sum().backward()
    assert x.grad[0].tolist() == [0, 0]


def test_class_centers_are_means_in_the_order_of_the_ids():
    embedding = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 8.0]])
    centers, classes = class_centers(embedding, torch.tensor([9, -1, 9]))
    assert classes.tolist() == [-1, 9]
    assert centers.tolist() == [[3, 4], [3, 5]]


def test_an_image_on_its_anchor_is_no_impostor():
    x, labels = torch.tensor([[1.0, 0], [1, 0], [0, 1]]), torch.tensor([0, 0, 1])
    assert as_set(semi_hard_triplets(x, labels)) == {(0, 1, 2), (1, 0, 2)}
    assert as_set(all_semi_hard_triplets(x, labels, margin=2)) == {(0, 1, 2), (1, 0, 2)}


def test_the_default_margin_is_that_of_the_miner_of_a_peer():
    x, labels = draw(([0, 0, 1, 1, 2, 2] * 4, 0))
    peer = TripletMarginMiner(margin=0.2, type_of_triplets="semihard")(x, labels)
    assert as_set(all_semi_hard_triplets(x, labels)) == as_set(Triplets(*peer))


def test_squared_distances_are_never_negative():
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).repeat(2, 1) + 3
    assert squared_distances(x).min() == 0 == squared_distances(x, x.clone()).min()


def test_distances_are_computed_in_single_under_autocast():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    first, second = torch.tensor([0, 3, 6, 2]), torch.tensor([1, 3, 0, 5])
    with torch.autocast("cpu", torch.bfloat16):
        within = pairwise_distances(x), pair_distances(x, first, second)
    torch.testing.assert_close(within, (pairwise_distances(x), pair_distances(x, first, second)), rtol=0, atol=0)
