"""Few-shot methods: each against an independent reference, and many tasks at once against one by one."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import reference
from refilled import methods
from refilled.data import Episodes, sample_episodes
from refilled.errors import MethodError, ModelError, NonFiniteError, RunError
from refilled.fewshot import ridge
from refilled.fewshot import students as students_module
from refilled.fewshot.bank import Bank
from refilled.fewshot.meta_learner import MetaTask
from refilled.fewshot.methods import (
    list_few_shot_methods,
    list_meta_learners,
    load_few_shot_method,
    load_meta_learner,
)
from refilled.fewshot.methods.feat import SetAttention, adapted_centers, adapted_scores
from refilled.fewshot.methods.fine_tune import tuned_classifier
from refilled.fewshot.methods.linear import logistic_regression
from refilled.fewshot.methods.maml import Maml, adapt, each_task, on_batch_statistics
from refilled.fewshot.methods.nearest_neighbour import similarity_to_nearest
from refilled.fewshot.methods.protonet import prototype_scores
from refilled.fewshot.methods.svm import support_vector_machine
from refilled.fewshot.students import StackedConvNets, StudentRecipe, student_learner, students, with_classifier
from refilled.models import create_model, freeze, save_model

WAY, SHOT, QUERY = 4, 3, 5
LABELS = torch.arange(WAY).repeat_interleave(SHOT)


def embeddings(tasks=3, dim=6, seed=0):
    """Support and query of tasks that can be told apart, but not all too easily."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(tasks, WAY, dim, generator=generator, dtype=torch.float64)

    def draw(count):
        labels = torch.arange(WAY).repeat_interleave(count)
        noise = torch.randn(tasks, len(labels), dim, generator=generator, dtype=torch.float64)
        return means[:, labels] + 0.7 * noise

    return draw(SHOT), draw(QUERY)


CLASSIFIERS = {
    "nearest_neighbour": similarity_to_nearest,
    "linear": logistic_regression,
    "svm": support_vector_machine,
    "fine_tune": partial(tuned_classifier, steps=30, lr=0.1),
    "protonet": prototype_scores,
    "feat": partial(adapted_scores, SetAttention(6).double().eval()),
}


@pytest.mark.parametrize("classify", CLASSIFIERS.values(), ids=CLASSIFIERS)
class TestEveryClassifier:
    def test_many_tasks_give_the_same_as_one_by_one(self, classify):
        support, query = embeddings(tasks=5)
        together = classify(support, LABELS, query)
        assert together.shape == (5, WAY * QUERY, WAY)
        alone = [classify(support[t : t + 1], LABELS, query[t : t + 1]) for t in range(5)]
        torch.testing.assert_close(together, torch.cat(alone))

    def test_the_order_of_the_support_images_does_not_matter(self, classify):
        support, query = embeddings()
        order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))
        shuffled = classify(support[:, order], LABELS[order], query)
        torch.testing.assert_close(shuffled, classify(support, LABELS, query), atol=1e-3, rtol=1e-3)

    def test_a_query_depends_on_no_other(self, classify):
        support, query = embeddings()
        torch.testing.assert_close(classify(support, LABELS, query[:, :2]), classify(support, LABELS, query)[:, :2])

    def test_it_learns(self, classify):
        support, query = embeddings(tasks=50, dim=6)
        right = classify(support, LABELS, query).argmax(2) == torch.arange(WAY).repeat_interleave(QUERY)
        assert right.double().mean() > 0.6


def test_the_nearest_neighbour_is_that_of_scikit_learn():
    support, query = embeddings()
    for t in range(3):
        theirs = (
            KNeighborsClassifier(1).fit(F.normalize(support[t], dim=1), LABELS).predict(F.normalize(query[t], dim=1))
        )
        assert similarity_to_nearest(support, LABELS, query)[t].argmax(1).tolist() == theirs.tolist()


@pytest.mark.parametrize("c", [0.1, 1.0, 50.0])
def test_logistic_regression_is_that_of_scikit_learn(c):
    support, query = embeddings()
    ours = logistic_regression(support, LABELS, query, c=c, tolerance=1e-9)
    for t in range(3):
        theirs = LogisticRegression(C=c, tol=1e-9, max_iter=5000).fit(support[t].numpy(), LABELS.numpy())
        scores = torch.from_numpy(theirs.decision_function(query[t].numpy()))
        torch.testing.assert_close(ours[t], scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dim", [6, 40])
def test_the_logistic_regression_is_found_without_extrapolation_too(monkeypatch, dim):
    support, query = embeddings(dim=dim)
    expected = logistic_regression(support, LABELS, query, c=50.0, tolerance=1e-9)
    monkeypatch.setattr(ridge, "_PATIENCE", 3)  # enough for none of them
    found = logistic_regression(support, LABELS, query, c=50.0, tolerance=1e-9)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("classify", "given"), [(logistic_regression, 1e-3), (support_vector_machine, 1e-4)])
@pytest.mark.parametrize(("shots", "dim"), [(1, 64), (30, 64), (5, 640)])
def test_single_precision_is_enough(classify, given, shots, dim):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(WAY).repeat_interleave(shots)
    means, noise = torch.randn(2, WAY, dim, generator=generator), torch.randn(2, len(labels), dim, generator=generator)
    support = F.normalize((means[:, labels] + 2 * noise).relu(), dim=2)
    exact = classify(support.double(), labels, support.double(), tolerance=1e-10)
    found = classify(support, labels, support)
    torch.testing.assert_close(found.double(), exact, atol=10 * given, rtol=0)


@pytest.mark.parametrize("c", [0.1, 1.0, 50.0])
def test_the_support_vector_machine_is_at_the_minimum_of_its_definition(c):
    support, query = embeddings(tasks=1)
    ours = support_vector_machine(support, LABELS, query, c=c, tolerance=1e-9)[0]
    x, asked = support[0].numpy(), query[0].numpy()
    for way in range(WAY):
        y = torch.where(way == LABELS, 1.0, -1.0).numpy()

        def objective(weights, y=y):
            hinge = (1 - y * (x @ weights[:-1] + weights[-1])).clip(min=0)
            gradient = -2 * c * hinge * y
            return 0.5 * weights[:-1] @ weights[:-1] + c * hinge @ hinge, [
                *(weights[:-1] + gradient @ x), gradient.sum(),
            ]  # fmt: skip

        found = minimize(objective, [0.0] * 7, jac=True, method="BFGS", options={"gtol": 1e-9}).x
        theirs = torch.from_numpy(asked @ found[:-1] + found[-1])
        torch.testing.assert_close(ours[:, way], theirs, atol=1e-4, rtol=1e-4)


def test_prototype_scores_equal_loops():
    support, query = embeddings()
    ours = prototype_scores(support, LABELS, query, 2.0)
    for t in range(3):
        for q, row in enumerate(query[t].tolist()):
            for way in range(WAY):
                center = reference.mean(support[t][way == LABELS].tolist())
                expected = -reference.squared_distance(row, center) / 2
                assert ours[t, q, way].item() == pytest.approx(expected)


def test_prototype_scores_are_those_of_easyfsl():
    methods = pytest.importorskip("easyfsl.methods")
    support, query = embeddings()
    network = methods.PrototypicalNetworks(nn.Identity())
    for t in range(3):
        network.process_support_set(support[t], LABELS)
        theirs = network(query[t]).detach()  # negative distances, not squared
        torch.testing.assert_close(prototype_scores(support, LABELS, query)[t], -theirs.square())


def test_set_attention_is_that_of_torch_with_one_head():
    ours = SetAttention(6).eval()
    theirs = nn.MultiheadAttention(6, 1, bias=True, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.load_state_dict(ours.out.state_dict())
        sets = torch.randn(3, 4, 6)
        attended, _ = theirs(sets, sets, sets)
        torch.testing.assert_close(ours(sets), ours.norm(sets + attended))


def test_adapted_centers_are_means_of_each_class_adapted_alone():
    attention = SetAttention(6).double().eval()
    support, _ = embeddings()
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))
    found = adapted_centers(attention, support[:, order], LABELS[order])
    for t in range(3):
        for way in range(WAY):
            expected = attention(support[t][None, way == LABELS]).mean(1)[0]
            torch.testing.assert_close(found[t, way], expected)


def test_the_second_order_gradient_is_that_of_an_explicit_loop_and_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, y, asked, answer = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(4))
    start = torch.randn(3, 3, generator=generator, dtype=torch.float64)

    def inner(weights):
        return (torch.tanh(x @ weights["w"]) - y).square().mean()

    def outer(w, first_order=False):
        adapted = adapt(inner, {"w": w}, steps=3, lr=0.5, first_order=first_order)
        return (torch.tanh(asked @ adapted["w"]) - answer).square().mean()

    def by_hand(w, create_graph):
        fast = w
        for _ in range(3):
            (gradient,) = torch.autograd.grad(inner({"w": fast}), fast, create_graph=create_graph)
            fast = fast - 0.5 * gradient
        return (torch.tanh(asked @ fast) - answer).square().mean()

    assert torch.autograd.gradcheck(outer, start.clone().requires_grad_())
    gradients = {}
    for first_order in (False, True):
        w, v = start.clone().requires_grad_(), start.clone().requires_grad_()
        outer(w, first_order).backward()
        by_hand(v, create_graph=not first_order).backward()
        torch.testing.assert_close(w.grad, v.grad)
        gradients[first_order] = w.grad
    assert not torch.allclose(gradients[True], gradients[False], rtol=0.01)


def meta_task(tasks=2, side=16, query=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels, asked = torch.arange(3).repeat_interleave(2), torch.arange(3).repeat_interleave(query)
    draw = partial(torch.randint, 0, 256, generator=generator, dtype=torch.uint8)
    return MetaTask(draw((tasks, 6, 3, side, side)), labels, draw((tasks, 3 * query, 3, side, side)), asked)


@pytest.mark.parametrize("first_order", [False, True])
def test_maml_gives_the_same_for_tasks_together_and_one_by_one(monkeypatch, first_order):
    torch.manual_seed(0)
    learner = Maml(create_model("convnet4", 3, image_size=16), 2, 0.1, first_order).double()
    task, found = meta_task(), {}
    learner._body[0].double()
    for together in (False, True):
        monkeypatch.setattr(
            "refilled.fewshot.methods.maml.each_task",
            lambda one, support, query, *, together, way=together: each_task(one, support, query, together=way),
        )
        learner.zero_grad()
        loss, scores = learner.loss(task)
        loss.backward()
        found[together] = [scores.detach(), *(p.grad for p in learner.parameters())]
    for one_by_one, mapped in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(mapped, one_by_one)
    assert not torch.equal(found[False][0][0], found[False][0][1])


@pytest.mark.parametrize("together", [False, True])
def test_second_derivatives_through_batch_norm_are_those_of_finite_differences(together):
    generator = torch.Generator().manual_seed(0)
    support, query = (torch.randn(2, 6, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    target = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    net = on_batch_statistics(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Tanh())).double()
    start = {name: torch.randn(p.shape, generator=generator).double() for name, p in net.named_parameters()}

    def error(weights, images):
        return (torch.func.functional_call(net, weights, (images,)).mean((2, 3)) - target).square().sum()

    def outer(*values):
        def one(images, asked):
            weights = dict(zip(start, values, strict=True))
            return error(adapt(lambda w: error(w, images), weights, steps=2, lr=0.05), asked)

        return each_task(one, support, query, together=together).sum()

    leaves = [value.clone().requires_grad_() for value in start.values()]
    outer(*leaves).backward()
    directions = [torch.randn(leaf.shape, generator=generator).double() for leaf in leaves]
    slope = sum((leaf.grad * direction).sum() for leaf, direction in zip(leaves, directions, strict=True))
    ends = [outer(*(v + s * d for v, d in zip(start.values(), directions, strict=True))) for s in (1e-5, -1e-5)]
    assert slope.item() == pytest.approx((ends[0] - ends[1]).item() / 2e-5, rel=1e-5)


@pytest.mark.slow
def test_maml_learns_sinusoids():
    """A regression net that has seen many sinusoids fits a new one from ten points after one step."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)

    def error(weights, x, y):
        return (torch.func.functional_call(net, weights, (x,)) - y).square().mean()

    def after_a_step(tasks):
        """Mean error on ten points of each task's sinusoid, before and after a step on ten others."""
        amplitude = 0.5 + 4 * torch.rand(tasks, 1, 1, generator=generator)
        phase = torch.pi * torch.rand(tasks, 1, 1, generator=generator)
        x = 10 * torch.rand(tasks, 20, 1, generator=generator) - 5
        y = amplitude * torch.sin(x - phase)
        weights = dict(net.named_parameters())

        def one(x, y):
            adapted = adapt(lambda w: error(w, x[:10], y[:10]), weights, steps=1, lr=0.01)
            return torch.stack([error(weights, x[10:], y[10:]), error(adapted, x[10:], y[10:])])

        return each_task(one, x, y, together=True).mean(0)

    untrained = after_a_step(200)[1].item()
    for _ in range(400):
        optimizer.zero_grad()
        after_a_step(25)[1].backward()
        optimizer.step()
    before, after = after_a_step(200).tolist()
    assert after < 0.5 * before
    assert after < 0.5 * untrained


@pytest.mark.parametrize("name", list_meta_learners())
def test_every_meta_learner_trains_all_that_it_learns(name):
    torch.manual_seed(0)
    learner = load_meta_learner(name).function(create_model("convnet4", 3, image_size=16))
    loss, scores = learner.loss(meta_task())
    assert scores.shape == (2, 6, 3)
    loss.backward()
    untouched = [n for n, p in learner.named_parameters() if p.grad is None or not p.grad.any()]
    # The nearest prototype needs no classifier; batch norm takes the bias of a convolution away again.
    allowed = ("backbone.classifier.", ".0.bias") if name != "maml" else (".0.bias",)
    assert [n for n in untouched if not any(part in n for part in allowed)] == []


def test_a_method_that_is_not_meta_trained_says_which_are():
    with pytest.raises(MethodError, match="'svm' is not meta-trained; feat and maml and protonet are"):
        load_meta_learner("svm")


# Students


@pytest.fixture(scope="module")
def pool():
    """Images of six classes that differ in colour, with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 6
    colors = 255 * torch.rand(6, 3, 1, 1, generator=generator)
    noise = 60 * torch.randn(60, 3, 16, 16, generator=generator)
    return (colors[labels] + noise).clamp(0, 255).to(torch.uint8), labels


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return freeze(create_model("convnet4_average", 6, image_size=16))


def episodes_of(labels, tasks=3, shot=2, way=3) -> Episodes:
    return sample_episodes(labels, range(tasks), n_way=way, n_shot=shot, n_query=3)


def test_convnets_side_by_side_are_the_convnets_alone():
    torch.manual_seed(0)
    models = [create_model("convnet4", 4, image_size=20).double() for _ in range(3)]
    images = torch.randint(0, 256, (3, 5, 3, 20, 20), dtype=torch.uint8)
    stacked = StackedConvNets([*models]).double()
    for seen, model, own in zip(stacked(images, features=True), models, images, strict=True):
        alone = model(own, features=True)
        torch.testing.assert_close(seen.logits, alone.logits)
        torch.testing.assert_close(seen.embedding, alone.embedding)
        for ours, theirs in zip(seen.features, alone.features, strict=True):
            torch.testing.assert_close(ours, theirs)
    generators = [[torch.Generator().manual_seed(seed) for seed in range(3)] for _ in range(2)]
    stacked.reset_classifiers(generators[0])
    students(models[:1]).reset_classifiers(generators[1][:1])
    torch.testing.assert_close(stacked.weight[0], models[0].classifier.weight)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vanilla", "refilled", "rkd", "regression"])
@pytest.mark.parametrize("shot", [1, 2])
@pytest.mark.parametrize("beginning", [{}, {"classifier": "probe", "norm": "frozen"}, {"classifier": "probe"}])
def test_students_trained_together_are_those_trained_one_by_one(pool, teacher, method, shot, beginning):
    pixels, labels = pool
    bank = Bank(pixels, teacher, augmentation="crop-flip")
    found = []
    for together in (1, 3):
        recipe = StudentRecipe(steps=4, lr=0.02, views=3, together=together, precision="32-true", **beginning)
        learner = student_learner(bank, double_convnet, partial_stages(methods.load_method(method)), recipe)
        found.append(learner(episodes_of(labels, shot=shot)))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
    assert found[0].std() > 0


def double_convnet(classes):
    return with_classifier(create_model("convnet4", 2, image_size=16), classes).double()


def partial_stages(method, **settings):
    return lambda student, teacher: method.build(student, teacher, settings)


def test_a_student_equals_a_plain_loop(pool):
    """One task by SGD as anybody would write it."""
    pixels, labels = pool
    drawn = episodes_of(labels, tasks=1)
    torch.manual_seed(0)
    start = create_model("convnet4", 3, image_size=16)
    recipe = StudentRecipe(steps=5, lr=0.02, momentum=0.5, weight_decay=0.01, precision="32-true")
    vanilla = methods.load_method("vanilla")
    bank = Bank(pixels)
    ours = student_learner(bank, lambda classes: with_classifier(start, classes), partial_stages(vanilla), recipe)(
        drawn
    )

    (seed,) = students_module._Group(bank, lambda classes: start, partial_stages(vanilla), recipe, drawn)._seeds(
        "student"
    )
    torch.manual_seed(seed)
    model = with_classifier(start, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5, weight_decay=0.01)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.02 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 5)).item())
        optimizer.zero_grad()
        F.cross_entropy(model(pixels[drawn.support[0]]).logits, drawn.labels).backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = 1.0  # what the one view of the support images, trained on as a whole, gives
    with torch.no_grad():
        model(pixels[drawn.support[0]])
        torch.testing.assert_close(ours[0], model.eval()(pixels[drawn.query[0]]).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_a_student_that_starts_from_a_probe_and_hardly_moves_is_the_logistic_regression(pool, teacher, norm):
    """With frozen statistics that of the model itself; with those of the batch, of the embedding that these give."""
    pixels, labels = pool
    drawn = episodes_of(labels, tasks=2, shot=5)
    settings = {"layers": "all", "steps": 1, "lr": 1e-9, "classifier": "probe", "norm": norm}
    scores = load_few_shot_method("fine_tune").learner(Bank(pixels, teacher), settings)(drawn)
    model = deepcopy(teacher).train(norm == "batch")
    for task in range(2):
        embedding = model(pixels[drawn.support[task]]).embedding
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and norm == "batch":
                module.reset_running_stats()
                module.momentum = 1.0
        model(pixels[drawn.support[task]])
        length = embedding.norm(dim=1).mean()
        asked = deepcopy(model).eval()(pixels[drawn.query[task]]).embedding
        expected = logistic_regression(embedding[None] / length, drawn.labels, asked[None] / length, c=10.0)[0]
        torch.testing.assert_close(scores[task], expected, atol=0.05, rtol=0.05)  # bfloat16 where there is


def test_frozen_statistics_do_not_change(pool, teacher):
    pixels, labels = pool
    group = students_module._Group(
        Bank(pixels, teacher),
        lambda classes: with_classifier(teacher, classes),
        partial_stages(methods.load_method("vanilla")),
        StudentRecipe(steps=2, norm="frozen"),
        episodes_of(labels, tasks=1),
    )
    group.scores()
    moved = group.students.models[0]
    torch.testing.assert_close(moved.blocks[0][1].running_mean, teacher.blocks[0][1].running_mean)
    assert not torch.equal(moved.blocks[0][1].weight, teacher.blocks[0][1].weight)


def test_support_images_take_turns_as_many_of_each_class(pool):
    pixels, labels = pool
    create = partial(create_model, "convnet4", image_size=16)
    drawn, recipe = episodes_of(labels, tasks=1, shot=5), StudentRecipe(shots=2)
    group = students_module._Group(Bank(pixels), create, partial_stages(methods.load_method("vanilla")), recipe, drawn)
    turns = [group._turn(step) for step in range(5)]
    assert all(drawn.labels[turn].tolist() == [0, 0, 1, 1, 2, 2] for turn in turns)
    assert torch.cat(turns).bincount().tolist() == [2] * 15
    group.recipe = StudentRecipe(shots=9)
    assert group._turn(0).tolist() == list(range(15))


def test_students_learn_and_do_not_change_the_teacher(pool, teacher):
    pixels, labels = pool
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    drawn = episodes_of(labels, tasks=2, shot=5)
    settings = {"steps": "20", "lr": "0.02", "kd_weight": "1"}
    scores = load_few_shot_method("refilled").learner(Bank(pixels, teacher), settings)(drawn)
    assert (scores.argmax(2) == drawn.query_labels).double().mean() > 0.7
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_a_task_does_not_depend_on_those_beside_it(pool, teacher):
    pixels, labels = pool
    learner = load_few_shot_method("rkd").learner(Bank(pixels, teacher), {"steps": 2})
    torch.testing.assert_close(
        learner(episodes_of(labels))[2:],
        learner(students_module.some_of(episodes_of(labels), torch.tensor([2]))),
    )


def test_global_randomness_is_left_alone(pool, teacher):
    pixels, labels = pool
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_few_shot_method("rkd").learner(Bank(pixels, teacher), {"steps": 1})(episodes_of(labels, tasks=1))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.slow
def test_fine_tuning_all_layers_starts_from_the_model(pool, teacher):
    pixels, labels = pool
    drawn = episodes_of(labels, tasks=2, shot=5)
    learner = load_few_shot_method("fine_tune").learner(Bank(pixels, teacher), {"layers": "all", "lr": "0.01"})
    assert (learner(drawn).argmax(2) == drawn.query_labels).double().mean() > 0.6


def test_a_student_may_start_from_a_folder(pool, teacher, tmp_path):
    pixels, labels = pool
    save_model(create_model("convnet4", 9, image_size=16), tmp_path)
    scores = load_few_shot_method("vanilla").learner(Bank(pixels), {"student": str(tmp_path), "steps": 1})
    assert scores(episodes_of(labels)).shape == (3, 9, 3)
    with pytest.raises(ModelError, match="there is no folder no/such"):
        load_few_shot_method("vanilla").learner(Bank(pixels), {"student": "no/such"})


def test_each_image_is_embedded_once(pool, teacher, monkeypatch):
    pixels, labels = pool
    seen = []
    embed = type(teacher).embed
    monkeypatch.setattr(type(teacher), "embed", lambda self, images: (seen.append(len(images)), embed(self, images))[1])
    bank = Bank(pixels, teacher)
    drawn = episodes_of(labels, tasks=30)
    first = bank.embedding(drawn.support)
    assert sum(seen) == len(drawn.support.unique())
    with monkeypatch.context() as patch:
        patch.setattr(Bank, "images", lambda *_: pytest.fail("images are looked at whose embeddings are known"))
        assert torch.equal(bank.embedding(drawn.support), first)
    bank.embedding(drawn.query)
    assert sum(seen) == len(torch.cat([drawn.support, drawn.query], 1).unique())
    torch.testing.assert_close(first[0], teacher(pixels[drawn.support[0]]).embedding)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("nearest_neighbour", "linear", "svm", "fine_tune", "protonet", "feat", "maml"),
        *("vanilla", "rkd", "refilled", "regression"),
    ],
)
def test_images_without_information_are_told_apart_by_chance(name):
    labels = torch.arange(400) % 8
    pixels = torch.randint(0, 256, (400, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    torch.manual_seed(0)
    head = {f"attention.{part}": value for part, value in SetAttention(64).state_dict().items()}
    bank = Bank(pixels, freeze(create_model("convnet4", 5, image_size=16)), head=head)
    drawn = sample_episodes(labels, range(30), n_way=5, n_shot=3, n_query=10)
    method = load_few_shot_method(name)
    learner = method.learner(bank, {"steps": 2} if "steps" in method.parameters else {})
    accuracy = (learner(drawn).argmax(2) == drawn.query_labels).double().mean()
    assert abs(accuracy - 0.2) < 0.04  # 1,500 queries: four standard errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in list_few_shot_methods() if n not in ("kd", "dkd", "kd_vid", "feat", "maml")]
)
def test_every_method_scores_every_query(pool, teacher, name):
    pixels, labels = pool
    method = load_few_shot_method(name)
    assert method.summary
    steps = {"steps": 2} if "steps" in method.parameters else {}
    scores = method.learner(Bank(pixels, teacher, augmentation="crop"), steps)(episodes_of(labels))
    assert scores.shape == (3, 9, 3)
    assert scores.isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("liner", {}, "unknown few-shot method 'liner'; did you mean 'linear'"),
        ("linear", {"d": 1}, "unknown parameter 'd'"),
        ("refilled", {"stps": 1}, "unknown parameter 'stps'; did you mean 'steps'"),
        ("feat", {}, "needs a model that was trained with it"),
        ("maml", {}, "as many classes as a task, 3, but the model was trained for 6"),
        ("kd", {"steps": 1}, "the classes of the teacher are not known; use refilled or rkd"),
    ],
)
def test_what_cannot_work_is_explained(pool, teacher, name, settings, message):
    pixels, labels = pool
    with pytest.raises(MethodError, match=message):
        load_few_shot_method(name).learner(Bank(pixels, teacher), settings)(episodes_of(labels))


def test_a_method_without_its_model_says_so(pool):
    pixels, labels = pool
    with pytest.raises(MethodError, match="pass one with --teacher"):
        load_few_shot_method("svm").learner(Bank(pixels), {})(episodes_of(labels))
    with pytest.raises(MethodError, match="learns from a teacher"):
        load_few_shot_method("rkd").learner(Bank(pixels), {})(episodes_of(labels))


def test_your_own_file_trains_students_or_says_that_it_does_not(pool, teacher, tmp_path):
    pixels, labels = pool
    (tmp_path / "mine.py").write_text(
        "from refilled.methods.vanilla import vanilla\n\n\n"
        "def mine(student, teacher, *, unused: float = 1.0):\n    return vanilla(student, teacher)\n"
    )
    mine = load_few_shot_method(str(tmp_path / "mine.py")).learner(Bank(pixels), {"steps": 1, "unused": "2"})
    assert mine(episodes_of(labels)).shape == (3, 9, 3)
    (tmp_path / "read.py").write_text(
        "from refilled.methods.linear_probe import linear_probe\n\n\n"
        "def read(student, teacher):\n    return linear_probe(None, teacher)\n"
    )
    with pytest.raises(MethodError, match="'read' trains no student; use a few-shot method"):
        load_few_shot_method(str(tmp_path / "read.py")).learner(Bank(pixels, teacher), {})(episodes_of(labels))
    with pytest.raises(MethodError, match="unknown few-shot method 'linear_probe'"):
        load_few_shot_method("linear_probe")


def test_a_recipe_out_of_range_and_a_loss_that_explodes_are_explained(pool):
    pixels, labels = pool
    with pytest.raises(RunError, match="steps = 0 is out of range"):
        load_few_shot_method("vanilla").learner(Bank(pixels), {"steps": 0})
    with pytest.raises(NonFiniteError, match="stage 'classifier', step"):
        load_few_shot_method("vanilla").learner(Bank(pixels), {"lr": 1e6})(episodes_of(labels, tasks=1))
