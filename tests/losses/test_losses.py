import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import reference
from refilled.errors import MethodError
from refilled.losses.distances import class_centers, pairwise_distances
from refilled.losses.local_kd import LocalKDLoss, LogitKDLoss, local_kd
from refilled.losses.mining import semi_hard_triplets
from refilled.losses.triplet_alignment import TripletAlignmentLoss, triplet_alignment
from refilled.stages import Precomputes, Reports

few = settings(max_examples=min(30, settings().max_examples), deadline=None)
seeds = st.integers(0, 2**32)
class_ids = st.lists(st.sampled_from([0, 1, 4, 5]), min_size=1, max_size=14)
temperatures = st.floats(0.1, 8)
negatives = pytest.mark.parametrize("negatives", ["nearest", "semihard"])
centers = pytest.mark.parametrize("centers", ["batch", "leave-one-out", "global"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def batch(labels: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student rows (N, 4), teacher rows (N, 6) and labels."""
    return normal(len(labels), 4, seed=seed), normal(len(labels), 6, seed=seed + 1), torch.tensor(labels)


LABELS = [0, 1, 0, 5, 1, 0, 5, 4, 1, 0]


@few
@given(st.lists(st.sampled_from([-3, 0, 7, 10**12]), min_size=1, max_size=14), seeds, temperatures, temperatures)
def test_triplet_alignment_equals_the_loop(labels, seed, tau_s, tau_t):
    student, teacher, y = batch(labels, seed)
    loss = TripletAlignmentLoss(temperature=tau_t, student_temperature=tau_s)
    expected = reference.triplet_alignment(student.tolist(), teacher.tolist(), labels, tau_s, tau_t)
    assert loss(student, teacher, y).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@few
@given(class_ids, seeds, temperatures, temperatures, st.floats(0.05, 2))
def test_tuple_alignment_equals_the_loop(labels, seed, tau_s, tau_t, margin):
    student, teacher, y = batch(labels, seed)
    loss = TripletAlignmentLoss(temperature=tau_t, student_temperature=tau_s, negatives="semihard", margin=margin)
    expected = reference.tuple_alignment(student.tolist(), teacher.tolist(), labels, tau_s, tau_t, margin)
    assert loss(student, teacher, y).item() == pytest.approx(expected, rel=1e-9, abs=1e-11)


@few
@given(class_ids, seeds, temperatures, temperatures)
def test_local_kd_equals_the_loop_for_all_kinds_of_centers(labels, seed, tau_s, tau_t):
    logits, teacher, y = normal(len(labels), 6, seed=seed), normal(len(labels), 3, seed=seed + 1), torch.tensor(labels)
    means = normal(6, 3, seed=seed + 2)
    given_rows = (logits.tolist(), teacher.tolist(), labels, tau_s, tau_t)
    settings = {"temperature": tau_t, "student_temperature": tau_s}

    def close(expected: float) -> object:
        return pytest.approx(expected, rel=1e-9, abs=1e-12)

    assert LocalKDLoss(**settings)(logits, teacher, y).item() == close(reference.local_kd(*given_rows))
    left_out = LocalKDLoss(centers="leave-one-out", **settings)(logits, teacher, y)
    assert left_out.item() == close(reference.local_kd(*given_rows, leave_one_out=True))
    everywhere = LocalKDLoss(centers="global", class_centers=means, **settings)(logits, teacher, y)
    assert everywhere.item() == close(reference.local_kd(*given_rows, centers=means.tolist()))
    right = LocalKDLoss(centers="global", class_centers=means, right_only=True, **settings)(logits, teacher, y)
    assert right.item() == close(reference.local_kd(*given_rows, centers=means.tolist(), right_only=True))
    for only in (False, True):
        loss = LocalKDLoss(centers="global", classes="all", class_centers=means, right_only=only, **settings)
        expected = reference.local_kd(*given_rows, centers=means.tolist(), every=True, right_only=only)
        assert loss(logits, teacher, y).item() == close(expected)
        loss.average = "elements"
        assert loss(logits, teacher, y).item() == close(expected / 6)
    over_elements = LocalKDLoss(average="elements", **settings)(logits, teacher, y).item()
    assert over_elements == close(reference.local_kd(*given_rows) / len(set(labels)))


def test_kd_of_the_teachers_logits_is_torch_s_divergence():
    student, teacher = normal(8, 5), normal(8, 5, seed=1)
    each = torch.nn.KLDivLoss(reduction="none")(student.log_softmax(1), (teacher / 3).softmax(1))
    for average, expected in (("images", each.sum(1).mean()), ("elements", each.mean())):
        torch.testing.assert_close(LogitKDLoss(3, average)(student, teacher, torch.zeros(8)), expected)


@few
@given(st.floats(-9, 9), st.floats(-9, 9))
def test_divergence_of_a_triplet_is_equation_6_up_to_a_constant(u_student, u_teacher):
    u = torch.tensor([u_student, u_student + 1], dtype=torch.float64, requires_grad=True)
    u_teacher = torch.tensor([u_teacher, u_teacher], dtype=torch.float64)
    p = torch.sigmoid(u_teacher)
    equation = (1 - p) * u + torch.log(1 + torch.exp(-u))
    divergence = triplet_alignment(u, u_teacher)
    torch.testing.assert_close(divergence[1] - divergence[0], equation[1] - equation[0], rtol=1e-9, atol=1e-12)
    (ours,) = torch.autograd.grad(divergence.sum(), u)
    (theirs,) = torch.autograd.grad(equation.sum(), u)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    q = torch.sigmoid(u)
    torch.testing.assert_close(
        divergence, p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("size", [10, 32])
def test_gradient_is_that_of_the_formula_on_the_mined_triplets(size):
    student, teacher, y = batch((4 * LABELS)[:size])
    student.requires_grad_()
    anchor, positive, negative = semi_hard_triplets(student, y)
    gaps = []
    for x in (student, teacher):
        d = pairwise_distances(torch.nn.functional.normalize(x))
        gaps.append(d[anchor, negative] - d[anchor, positive])
    (expected,) = torch.autograd.grad(triplet_alignment(gaps[0], gaps[1] / 2).sum(), student)
    (ours,) = torch.autograd.grad(TripletAlignmentLoss()(student, teacher, y), student)
    torch.testing.assert_close(ours, expected)


@negatives
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_gradients_of_the_triplet_loss_pass_gradcheck(negatives, reduction):
    student, teacher, y = batch(LABELS)
    loss = TripletAlignmentLoss(negatives=negatives, reduction=reduction, margin=0.5, student_temperature=0.7)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, y), student.requires_grad_())


@centers
@pytest.mark.parametrize("normalize", [False, True])
def test_the_gradients_of_local_kd_pass_gradcheck(centers, normalize):
    logits, teacher, y = normal(10, 7), normal(10, 3, seed=1), torch.tensor(LABELS)
    loss = LocalKDLoss(centers=centers, normalize=normalize, student_temperature=0.7)
    loss.precompute(teacher, y)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, y), logits.requires_grad_())


@negatives
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(negatives):
    student, teacher, y = batch(LABELS)
    loss = TripletAlignmentLoss(temperature=1, negatives=negatives)
    same = student.clone().requires_grad_()
    value = loss(same, student, y)
    value.backward()
    torch.testing.assert_close(value.detach(), torch.zeros_like(value), atol=1e-12, rtol=0)
    torch.testing.assert_close(same.grad, torch.zeros_like(student), atol=1e-12, rtol=0)
    assert loss(student, teacher, y) > 0


@pytest.mark.slow
@negatives
@few
@given(class_ids, seeds, st.floats(0.1, 10))
def test_alignment_ignores_order_rotation_and_scale_and_is_never_negative(negatives, labels, seed, scale):
    student, teacher, y = batch(labels, seed)
    loss = TripletAlignmentLoss(negatives=negatives)
    value = loss(student, teacher, y)
    assert value >= -1e-12
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(normal(4, 4, seed=seed)).Q
    torch.testing.assert_close(loss(student[order], teacher[order], y[order]), value)
    torch.testing.assert_close(loss(scale * student @ rotation, teacher / scale, y), value)


@centers
@few
@given(class_ids, seeds)
def test_local_kd_ignores_order_and_rotation_and_is_never_negative(centers, labels, seed):
    logits, teacher, y = normal(len(labels), 6, seed=seed), normal(len(labels), 3, seed=seed + 1), torch.tensor(labels)
    loss = LocalKDLoss(centers=centers)
    loss.precompute(teacher, y)
    value = loss(logits, teacher, y)
    assert value >= -1e-12
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss(logits[order], teacher[order], y[order]), value)
    rotated = teacher @ torch.linalg.qr(normal(3, 3, seed=seed)).Q
    loss.precompute(rotated, y)
    torch.testing.assert_close(loss(logits, rotated, y), value)


DEGENERATE = {
    "one image": (normal(1, 4), [0]),
    "no pair": (normal(3, 4), [0, 1, 2]),
    "one class": (normal(3, 4), [5, 5, 5]),
    "identical": (torch.ones(4, 4), [0, 0, 1, 1]),
    "zeros": (torch.zeros(4, 4), [0, 0, 1, 1]),
    "one row of zeros": (normal(4, 4) * torch.tensor([[0.0], [1], [1], [1]]), [0, 0, 1, 1]),
    "positive on the anchor": (normal(4, 4)[[0, 0, 1, 2]], [0, 0, 1, 1]),
    "impostor on the anchor": (normal(4, 4)[[0, 1, 0, 2]], [0, 0, 1, 1]),
    "opposite": (torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0]] * 2), [0, 0, 1, 1]),
    "tiny": (1e-30 * normal(4, 4), [0, 0, 1, 1]),
    "huge": (1e15 * normal(4, 4), [0, 0, 1, 1]),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize(
    "loss",
    [
        TripletAlignmentLoss(),
        TripletAlignmentLoss(reduction="mean"),
        TripletAlignmentLoss(negatives="semihard", margin=2),
        TripletAlignmentLoss(negatives="semihard", reduction="mean"),
        LocalKDLoss(),
        LocalKDLoss(centers="leave-one-out", normalize=True),
    ],
    ids=lambda loss: f"{type(loss).__name__}({loss.extra_repr()})",
)
def test_degenerate_batches_stay_finite_and_connected(loss, name):
    rows, labels = DEGENERATE[name]
    student = torch.cat([rows, rows], dim=1).float().requires_grad_()  # as logits, there must be 6 classes
    teacher, y = normal(len(rows), 6, dtype=torch.float32), torch.tensor(labels)
    for taught in (teacher, torch.zeros_like(teacher), torch.ones_like(teacher)):
        value = loss(student, taught, y)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert gradient.isfinite().all()


@negatives
def test_an_embedding_that_is_not_finite_is_not_ignored(negatives):
    student, teacher, y = batch(LABELS)
    student[3, 0] = torch.nan
    assert TripletAlignmentLoss(negatives=negatives)(student, teacher, y).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "loss",
    [TripletAlignmentLoss(), TripletAlignmentLoss(negatives="semihard"), LocalKDLoss()],
    ids=lambda loss: str(loss),
)
def test_half_precision_is_computed_in_single(loss, dtype):
    student, teacher, y = normal(10, 6).to(dtype), 100 * normal(10, 6, seed=1).to(dtype), torch.tensor(LABELS)
    student.requires_grad_()
    full = student.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, y)
    torch.testing.assert_close(value, loss(full, teacher.float(), y))
    value.backward()
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


def test_mean_is_the_sum_over_the_number():
    student, teacher, y = batch(LABELS)
    for negatives, counted in (("nearest", "triplets"), ("semihard", "tuples")):
        total = TripletAlignmentLoss(negatives=negatives)
        mean = TripletAlignmentLoss(negatives=negatives, reduction="mean")(student, teacher, y)
        torch.testing.assert_close(mean, total(student, teacher, y) / total.statistics()[counted])


def test_statistics_count_the_last_batch():
    student, teacher, y = batch(LABELS)
    loss = TripletAlignmentLoss()
    assert isinstance(loss, Reports)
    assert loss.statistics() == {}
    loss(student, teacher, y)
    triplets = semi_hard_triplets(student, y)
    d = torch.tensor(reference.unit_distances(teacher.tolist()))
    violated = d[triplets.anchor, triplets.negative] < d[triplets.anchor, triplets.positive]
    assert loss.statistics()["triplets"] == len(triplets.anchor)
    assert loss.statistics()["violated"].item() == pytest.approx(violated.double().mean().item())
    loss = TripletAlignmentLoss(negatives="semihard", margin=0.3)
    loss(student, teacher, y)
    impostors = [len(k) for k in reference.semi_hard(student.tolist(), y.tolist(), 0.3).values() if k]
    assert loss.statistics()["tuples"] == len(impostors)
    assert loss.statistics()["impostors"].item() == pytest.approx(sum(impostors) / len(impostors))


def test_no_gradient_reaches_the_teacher():
    student, teacher, y = batch(LABELS)
    teacher.requires_grad_()
    for loss in (TripletAlignmentLoss(), TripletAlignmentLoss(negatives="semihard")):
        loss(student.requires_grad_(), teacher, y).backward()
    LocalKDLoss()(normal(10, 6).requires_grad_(), teacher, y).backward()
    assert teacher.grad is None


@pytest.mark.slow
@negatives
@pytest.mark.parametrize("size", [512, pytest.param(4096, marks=pytest.mark.slow)])
def test_memory_stays_below_ten_matrices_of_the_batch(negatives, size):
    student = normal(size, 64, dtype=torch.float32).requires_grad_()
    teacher = normal(size, 128, seed=1, dtype=torch.float32)
    y = torch.randint(100, (size,), generator=torch.Generator().manual_seed(0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        TripletAlignmentLoss(negatives=negatives)(student, teacher, y).backward()
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert peak > 4 * size**2
    assert peak < 10 * 4 * size**2


def test_global_centers_are_the_means_of_the_set_that_was_shown():
    teacher, y = 3 * normal(20, 5), torch.randint(4, (20,), generator=torch.Generator().manual_seed(0))
    logits = normal(20, 6)
    ready = LocalKDLoss(centers="global")
    assert isinstance(ready, Precomputes)
    ready.precompute(teacher, y)
    torch.testing.assert_close(ready(logits, teacher, y), LocalKDLoss()(logits, teacher, y))
    given_means = LocalKDLoss(centers="global", class_centers=class_centers(teacher, y)[0])
    torch.testing.assert_close(given_means(logits[:5], teacher[:5], y[:5]), ready(logits[:5], teacher[:5], y[:5]))

    normalized = LocalKDLoss(centers="global", normalize=True)
    normalized.precompute(teacher, y)
    torch.testing.assert_close(normalized(logits, teacher, y), LocalKDLoss(normalize=True)(logits, 7 * teacher, y))


def test_global_centers_live_in_the_state_dict():
    teacher, y, logits = normal(20, 5), torch.arange(20) % 4, normal(20, 6)
    ready = LocalKDLoss(centers="global")
    assert ready.state_dict() == {}
    ready.precompute(teacher, y)
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(ready).state_dict(), file)
    file.seek(0)
    restored = LocalKDLoss(centers="global")
    torch.nn.Sequential(restored).load_state_dict(torch.load(file))
    for loss in (restored, copy.deepcopy(ready)):
        torch.testing.assert_close(loss(logits, teacher, y), ready(logits, teacher, y))
    ready.precompute(teacher[:9], y[:9] % 2)
    ready.load_state_dict(restored.state_dict())
    assert ready.class_centers.shape == (4, 5)
    assert LocalKDLoss(centers="batch").state_dict() == {}


def test_only_image_of_a_class_is_its_own_center_when_left_out():
    logits, teacher, y = normal(3, 3), normal(3, 5), torch.tensor([0, 1, 2])
    left_out = local_kd(logits, teacher, y, centers="leave-one-out")
    torch.testing.assert_close(left_out, local_kd(logits, teacher, y, centers="batch"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TripletAlignmentLoss(temperature=0), "temperature must be greater than 0, but is 0"),
        (lambda: TripletAlignmentLoss(student_temperature=-1), "student_temperature must be"),
        (lambda: TripletAlignmentLoss(margin=float("nan")), "margin must be"),
        (lambda: TripletAlignmentLoss(negatives="near"), "did you mean 'nearest'"),
        (lambda: TripletAlignmentLoss(reduction="none"), "known: mean, sum"),
        (lambda: TripletAlignmentLoss(negatives="semihard", temperature=0.01), "below 0.02"),
        (lambda: LocalKDLoss(temperature=0), "temperature must be"),
        (lambda: LocalKDLoss(centers="globe"), "did you mean 'global'"),
        (lambda: LocalKDLoss(class_centers=torch.zeros(2, 3)), "centers is 'batch'"),
        (lambda: LocalKDLoss(centers="global", classes="al"), "did you mean 'all'"),
        (lambda: LocalKDLoss(classes="all"), "classes='all' needs centers='global', but centers is 'batch'"),
        (lambda: local_kd(normal(1, 2), normal(1, 3), torch.tensor([0]), classes="all"), "does not give means of all"),
        (lambda: LocalKDLoss(centers="global")(normal(2, 2), normal(2, 3), torch.tensor([0, 1])), "call precompute"),
        (lambda: LocalKDLoss()(normal(2, 2), normal(2, 3), torch.tensor([0, 2])), r"class id 2 is not in 0 \.\. 2 - 1"),
        (lambda: LocalKDLoss()(normal(2, 2), normal(2, 3), torch.tensor([-1, 0])), "class id -1"),
        (lambda: LocalKDLoss()(normal(2, 2), normal(3, 3), torch.tensor([1, 0])), r"\(2, 2\) and \(3, 3\)"),
        (lambda: LocalKDLoss(centers="global").precompute(normal(2, 3), torch.tensor([-2, 0])), "class id -2"),
        (lambda: local_kd(normal(1, 9), normal(1, 3), torch.tensor([5]), centers=normal(5, 3)), "class id 5"),
        (lambda: local_kd(normal(1, 9), normal(1, 3), torch.tensor([0]), centers=normal(5, 4)), "same teacher"),
        (lambda: TripletAlignmentLoss()(normal(4, 2), normal(4, 2), torch.zeros(4, 1)), r"labels \(4, 1\)"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(MethodError, match=message):
        call()


def test_classes_without_an_image_in_the_training_set_are_not_compared_with():
    means, y = normal(4, 3), torch.tensor([0, 2, 0])
    means[1] = torch.nan
    logits, teacher = normal(3, 4, seed=1), normal(3, 3, seed=2)
    loss = local_kd(logits, teacher, y, centers=means, classes="all")
    known = [0, 2, 3]
    others = local_kd(logits[:, known], teacher, torch.tensor([0, 1, 0]), centers=means[known], classes="all")
    torch.testing.assert_close(loss, others)


def test_a_class_without_an_image_in_the_training_set_is_named():
    loss = LocalKDLoss(centers="global")
    loss.precompute(normal(2, 3), torch.tensor([0, 2]))
    with pytest.raises(MethodError, match="class 1 had no image"):
        loss(normal(2, 3), normal(2, 3), torch.tensor([0, 1]))


@pytest.mark.slow
def test_defaults_are_those_of_the_paper():
    student, teacher, y = batch(LABELS)
    logits = normal(10, 6)
    rows = (student.tolist(), teacher.tolist(), LABELS)
    assert TripletAlignmentLoss()(student, teacher, y).item() == pytest.approx(
        reference.triplet_alignment(*rows, 1.0, 2.0)
    )
    assert TripletAlignmentLoss(negatives="semihard")(student, teacher, y).item() == pytest.approx(
        reference.tuple_alignment(*rows, 1.0, 2.0, 0.2)
    )
    local = pytest.approx(reference.local_kd(logits.tolist(), teacher.tolist(), LABELS, 1.0, 2.0))
    assert local_kd(logits, teacher, y).item() == LocalKDLoss()(logits, teacher, y).item() == local
    assert LogitKDLoss()(logits, teacher, y) == LogitKDLoss(2.0, "images")(logits, teacher, y)


def one_triplet() -> tuple[Tensor, Tensor, Tensor]:
    """Three points of a circle with a single triplet, which the teacher violates."""
    at, of_teacher = torch.tensor([[0.0, 1.0, 1.5], [0.0, 1.5, 1.0]], dtype=torch.float64)
    return (
        torch.stack([at.cos(), at.sin()], 1),
        torch.stack([of_teacher.cos(), of_teacher.sin()], 1),
        torch.tensor([0, 0, 1]),
    )


@pytest.mark.parametrize(
    ("negatives", "names"), [("nearest", ["triplets", "violated"]), ("semihard", ["tuples", "impostors"])]
)
def test_statistics_and_mean_of_one_triplet_and_of_none(negatives, names):
    student, teacher, y = one_triplet()
    mean = TripletAlignmentLoss(negatives=negatives, margin=1, reduction="mean")
    total = TripletAlignmentLoss(negatives=negatives, margin=1)
    assert mean(student, teacher, y) == total(student, teacher, y) > 0.01
    assert list(mean.statistics()) == names
    assert all(value == 1 for value in mean.statistics().values())
    assert mean(student, teacher, torch.arange(3)) == 0
    assert all(value == 0 for value in mean.statistics().values())
    assert mean(torch.full_like(student, torch.nan), teacher, torch.arange(3)).isnan()


def test_a_triplet_on_which_the_teacher_has_no_opinion_is_not_violated():
    student, teacher, y = one_triplet()
    loss = TripletAlignmentLoss()
    loss(student, torch.zeros_like(teacher), y)
    assert loss.statistics()["triplets"] == 1
    assert loss.statistics()["violated"] == 0


def test_tuples_at_the_lowest_temperature_do_not_overflow():
    student, teacher, y = batch(4 * LABELS)
    student[:6] = student[0]  # from the smallest distance to the largest
    teacher[:6] = teacher[0]
    student[6], teacher[6] = -student[0], -teacher[0]
    loss = TripletAlignmentLoss(negatives="semihard", temperature=0.02, student_temperature=0.02, margin=2)
    single = loss(student.float().requires_grad_(), teacher.float(), y)
    torch.testing.assert_close(single.double(), loss(student, teacher, y), rtol=1e-3, atol=0)
    with pytest.raises(MethodError, match=r"below 0\.02"):
        TripletAlignmentLoss(negatives="semihard", student_temperature=0.019)
    TripletAlignmentLoss(temperature=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: local_kd(normal(2, 2), normal(2, 3), torch.tensor([0, 1]), average="mean"), "average"),
        (lambda: LocalKDLoss(average="mean"), "average"),
        (lambda: LocalKDLoss(student_temperature=0), "student_temperature must be"),
        (lambda: LocalKDLoss(doubt=-0.5), "doubt and refine must be 0 or more"),
        (lambda: LocalKDLoss(refine=-1), "doubt and refine must be 0 or more"),
        (lambda: LocalKDLoss(centers="global", class_centers=normal(2, 3), centered=True), "drop centered"),
        (lambda: LocalKDLoss(centers="global").precompute(normal(2, 3), torch.tensor([0])), r"\(2, 3\) with labels"),
        (lambda: LocalKDLoss()(normal(3, 3), normal(3, 2), torch.tensor([0, 1, 5])), "class id 5 is not in"),
        (lambda: LocalKDLoss(centered=True)(normal(2, 2), normal(2, 3), torch.tensor([0, 1])), "has no mean of the"),
        (lambda: LogitKDLoss(0), "temperature must be"),
        (lambda: LogitKDLoss(average="mean"), "average"),
        (lambda: TripletAlignmentLoss()(normal(3, 2), normal(4, 2), torch.tensor([0, 0, 1])), r"\(3, 2\) and \(4, 2"),
        (lambda: local_kd(normal(1, 9), normal(1, 3), torch.tensor([0]), centers=normal(3)), "same teacher"),
        (lambda: local_kd(normal(1, 9), normal(1, 3), torch.tensor([-1]), centers=normal(5, 4)), "same teacher"),
    ],
)
def test_more_mistakes_are_named(call, message):
    with pytest.raises(MethodError, match=message):
        call()


def test_what_a_loss_needs_follows_from_its_parameters():
    kinds = [LocalKDLoss(), LocalKDLoss(centered=True), LocalKDLoss(centers="global")]
    assert [loss.needs_training_set for loss in kinds] == [False, True, True]
    assert [loss.sees_unlabelled for loss in kinds] == [False, False, True]
    assert LogitKDLoss.reads_labels is False
    kinds[1].precompute(normal(4, 3), torch.arange(4))
    assert kinds[1].class_centers is None
    assert "centers=global, classes=batch, temperature=2.0" in repr(kinds[2])
    assert "negatives=nearest, temperature=2.0, reduction=sum" in repr(TripletAlignmentLoss())


def test_means_are_loaded_only_where_they_are_used():
    ready = LocalKDLoss(centers="global", centered=True)
    ready.precompute(normal(4, 3), torch.arange(4))
    with pytest.raises(RuntimeError, match="class_centers"):
        LocalKDLoss().load_state_dict(ready.state_dict())
    fresh = LocalKDLoss(centers="global", centered=True)
    fresh.load_state_dict({})  # saved before precompute()
    assert fresh.class_centers is None
    fresh.load_state_dict(ready.state_dict())
    assert torch.equal(fresh.mean, ready.mean)
