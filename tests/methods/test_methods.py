"""Every method keeps the same promises; each loss equals its formula written out."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refilled.errors import MethodError
from refilled.losses.local_kd import LocalKDLoss
from refilled.methods import list_methods, load_method
from refilled.methods.kd import softened_kl
from refilled.methods.regression import EmbeddingRegressionLoss, misalignment
from refilled.methods.rkd import angles, relative_distances
from refilled.methods.self_training import PseudoLabelLoss
from refilled.models import create_model
from refilled.outputs import Outputs
from refilled.stages import FineTuning, Precomputes, Readout

CLASSES = 7
SETTINGS = {"self_training": {"threshold": 0.0}}  # guesses of random logits are not sure


def shape(dim, classes=("a", "b", "c", "d", "e", "f", "g")):
    channels = (dim // 4, dim // 2)
    return SimpleNamespace(embedding_dim=dim, feature_channels=channels, num_classes=len(classes), class_names=classes)


def outputs(batch, dim, grad, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + dim)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    maps = [draw(batch, channels, side, side) for channels, side in ((dim // 4, dim // 2), (dim // 2, dim // 4))]
    return Outputs(draw(batch, CLASSES), draw(batch, dim), tuple(maps))


def leaves(part):
    """The tensors of a part of the outputs: the part itself, or each of the feature maps."""
    return part if isinstance(part, tuple) else (part,)


def gradients(seen, term):
    """Gradients of what a term reads; a loss may leave out some of the feature maps."""
    found = [leaf.grad for leaf in leaves(getattr(seen, term.student)) if leaf.grad is not None]
    assert found
    return found


def stages(name):
    """What a method trains; nothing for a readout."""
    plan = load_method(name).build(shape(16), shape(24), SETTINGS.get(name, {}))
    return [] if isinstance(plan, Readout) else plan.stages if isinstance(plan, FineTuning) else plan


TRAINING = [name for name in list_methods() if stages(name)]


def terms(name):
    for stage in stages(name):
        for term in stage.terms.values():
            if isinstance(term.loss, Precomputes) and term.teacher is not None:
                term.loss.precompute(torch.randn(70, 24), torch.arange(70) % CLASSES)
            yield term


@pytest.mark.parametrize("name", TRAINING)
class TestEveryMethodThatTrains:
    def test_gives_finite_losses_whose_gradient_reaches_what_it_reads(self, name):
        for term in terms(name):
            labels = torch.arange(30) % CLASSES
            if isinstance(term.loss, PseudoLabelLoss):
                labels[20:] = -1  # it is about these alone
            seen, taught = outputs(30, 16, grad=True), outputs(30, 24, grad=True)
            loss = term(seen, taught, labels)
            assert loss.shape == ()
            assert loss.isfinite()
            loss.backward()
            for gradient in [*gradients(seen, term), *(p.grad for p in term.loss.parameters())]:
                assert gradient.isfinite().all()
                assert gradient.any()
            assert all(leaf.grad is None for part in taught for leaf in leaves(part))

    def test_does_not_depend_on_the_order_of_the_batch(self, name):
        labels = torch.arange(30) % CLASSES
        order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
        for term in terms(name):
            seen, taught = (outputs(30, dim, grad=False, dtype=torch.float64) for dim in (16, 24))
            shuffled = [
                Outputs(o.logits[order], o.embedding[order], tuple(f[order] for f in o.features))
                for o in (seen, taught)
            ]
            torch.testing.assert_close(term(seen, taught, labels), term(*shuffled, labels[order]))

    def test_says_whether_it_reads_labels(self, name):
        for term in terms(name):
            seen, taught = outputs(30, 16, grad=False), outputs(30, 24, grad=False)
            found = [term(seen, taught, labels) for labels in (torch.arange(30) % CLASSES, torch.arange(30) // 5)]
            assert term.reads_labels or torch.equal(*found)
            if term.teacher is None:  # cross-entropy
                assert term.reads_labels

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_stays_finite_in_half_precision(self, name, dtype):
        labels = torch.arange(30) % CLASSES
        for term in terms(name):
            seen, taught = outputs(30, 16, grad=True, dtype=dtype), outputs(30, 24, grad=False, dtype=dtype)
            loss = term(seen, taught, labels)
            loss.backward()
            assert loss.isfinite()
            assert all(gradient.isfinite().all() for gradient in gradients(seen, term))

    @pytest.mark.parametrize(
        "labels", [[0], [3, 3, 3, 3], [0, 1, 2, 3, 4, 5, 6]], ids=["one image", "one class", "all distinct"]
    )
    def test_survives_degenerate_batches(self, name, labels):
        labels = torch.tensor(labels)
        for embedding in (torch.zeros, torch.ones, torch.randn):
            for term in terms(name):
                n = len(labels)
                seen = Outputs(
                    torch.randn(n, CLASSES).requires_grad_(),
                    embedding(n, 16).requires_grad_(),
                    (embedding(n, 4, 8, 8).requires_grad_(), embedding(n, 8, 4, 4).requires_grad_()),
                )
                taught = Outputs(
                    torch.randn(n, CLASSES), embedding(n, 24), (embedding(n, 6, 12, 12), embedding(n, 12, 6, 6))
                )
                loss = term(seen, taught, labels)
                loss.backward()
                assert loss.isfinite()
                assert all(gradient.isfinite().all() for gradient in gradients(seen, term))

    def test_has_a_summary_and_shares_that_can_be_divided(self, name):
        assert load_method(name).summary
        assert sum(stage.share for stage in stages(name)) > 0

    def test_refuses_other_classes_exactly_if_it_reads_the_logits(self, name):
        method, other = load_method(name), shape(24, ("u", "v", "w", "x", "y", "z", "g"))
        if not any(stage.reads("logits") for stage in stages(name)):
            assert method.build(shape(16), other, {})
            return
        with pytest.raises(
            MethodError, match=f"'{name}' compares logits class by class, but .* share 1 of 7 classes; use refilled"
        ):
            method.build(shape(16), other, {})


def test_settings_are_read_by_the_signature():
    settled = load_method("refilled").settle(
        {"temperature": "4", "centers": "global", "normalize": "true", "gamma": "0.1"}
    )
    assert settled["temperature"] == 4.0
    assert settled["centers"] == "global"
    assert settled["normalize"] is True
    assert settled["gamma"] == 0.1
    assert load_method("refilled").settle({"gamma": "none"})["gamma"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temprature": "2"}, "unknown parameter 'temprature'; did you mean 'temperature'"),
        ({"temperature": "warm"}, "must be float"),
        ({"centers": "globl"}, "did you mean 'global'"),
        ({"normalize": "maybe"}, "must be true or false"),
    ],
)
def test_wrong_settings_are_explained(settings, message):
    with pytest.raises(MethodError, match=message):
        load_method("refilled").settle(settings)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(MethodError, match="unknown method 'rdk'; did you mean 'rkd'"):
        load_method("rdk")


@pytest.mark.parametrize("name", sorted(set(list_methods()) - {"vanilla", "self_training"}))
def test_a_method_needs_the_teacher_that_it_reads(name):
    with pytest.raises(MethodError, match=f"'{name}' learns from a teacher"):
        load_method(name).build(shape(16), None, {})


@pytest.mark.parametrize("name", list_methods())
def test_a_method_needs_a_student_exactly_if_it_trains_one_of_its_own(name):
    method = load_method(name)
    if not method.takes_student:
        assert isinstance(method.build(None, shape(24), {}), Readout | FineTuning)
        return
    with pytest.raises(MethodError, match=f"'{name}' trains a student; name one with --student"):
        method.build(None, shape(24), {})


def test_your_own_method_without_annotations_is_trusted(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from refilled.stages import Readout, Stage, Term\nfrom torch import nn\n"
        "def mine(student, teacher, *, reads: bool = False):\n"
        "    return Readout(None) if reads else [Stage('a', {'ce': Term(nn.CrossEntropyLoss())})]"
    )
    mine = load_method(str(tmp_path / "mine.py"))
    assert mine.build(shape(16), None, {})[0].name == "a"
    with pytest.raises(MethodError, match="learns from a teacher"):
        mine.build(shape(16), None, {"reads": True})


def test_your_own_file_is_a_method(tmp_path: Path):
    text = Path(__file__).parents[2].joinpath("CONTRIBUTING.md").read_text()
    file = tmp_path / "similarity.py"
    file.write_text(text.split("```python\n")[1].split("```")[0])
    method = load_method(str(file))
    assert method.settle({"weight": "3"}) == {"weight": 3.0}
    (stage,) = method.build(shape(16), shape(24), {})
    assert stage.terms["similarity"](outputs(9, 16, True), outputs(9, 24, False), torch.arange(9) % 7) > 0


@pytest.mark.parametrize(
    ("content", "message"), [("", "must define the function mine"), ("import nothing_like_it", "cannot be imported")]
)
def test_a_broken_file_is_explained(tmp_path, content, message):
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(MethodError, match=message):
        load_method(str(tmp_path / "mine.py"))


def test_one_stage_refilled_sums_the_terms_of_both():
    (stage,) = load_method("refilled").build(shape(16), shape(24), {"gamma": 0.1})
    assert set(stage.terms) == {"alignment", "ce", "local_kd"}
    assert stage.terms["alignment"].weight(7) == 0.1


def test_the_weight_of_local_distillation_decays_as_in_the_paper():
    _, stage = load_method("refilled").build(shape(16), shape(24), {})
    weights = [stage.terms["local_kd"].weight(epoch) for epoch in range(3)]
    assert weights == pytest.approx([10, 10 * 2.718281828**-0.05, 10 * 2.718281828**-0.1])
    _, fixed = load_method("refilled").build(shape(16), shape(24), {"kd_decay": 0.0})
    assert {fixed.terms["local_kd"].weight(epoch) for epoch in range(3)} == {10.0}
    _, alone = load_method("refilled").build(shape(16), shape(24), {"kd_weight": 0.0})
    assert set(alone.terms) == {"ce"}


def test_kd_equals_the_divergence_written_out():
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    written_out = 16 * (p * (p / q).log()).sum() / 5
    torch.testing.assert_close(softened_kl(student, teacher, 4.0), written_out)


def test_rkd_distances_and_angles_equal_loops():
    x = torch.randn(6, 4, dtype=torch.float64)
    apart = [(x[i] - x[j]).norm() for i in range(6) for j in range(6) if i != j]
    scale = torch.stack(apart).mean()
    distances, cosines = relative_distances(x), angles(x)
    for i in range(6):
        for j in range(6):
            torch.testing.assert_close(distances[i, j], (x[i] - x[j]).norm() / scale)
            for k in range(6):
                expected = torch.zeros((), dtype=torch.float64)
                if i != j and k != j:
                    expected = F.normalize(x[i] - x[j], dim=0) @ F.normalize(x[k] - x[j], dim=0)
                torch.testing.assert_close(cosines[j, i, k], expected)


def test_rkd_trains_in_two_stages_or_beside_cross_entropy():
    networks = [shape(16), shape(32)]
    rkd = load_method("rkd")
    assert [(stage.share, set(stage.terms)) for stage in rkd.build(*networks, {})] == [
        (0.5, {"distance", "angle"}),
        (0.5, {"ce"}),
    ]
    (stage,) = rkd.build(*networks, {"joint": True})
    assert set(stage.terms) == {"ce", "distance", "angle"}
    assert [stage.terms[name].weight(0) for name in ("distance", "angle")] == [25, 50]


def test_rkd_does_not_see_rotation_and_scale():
    x = torch.randn(8, 5, dtype=torch.float64)
    turned = 3 * x @ nn.init.orthogonal_(torch.empty(5, 5, dtype=torch.float64))
    torch.testing.assert_close(relative_distances(turned), relative_distances(x))
    torch.testing.assert_close(angles(turned), angles(x))


def test_refilled_takes_in_regression_and_can_leave_out_stage_1():
    settings = {"embedding_share": 0.0, "centers": "global", "centered": True, "regression_weight": 10.0}
    embedding, classifier = load_method("refilled").build(shape(16), shape(24), settings)
    assert (embedding.share, classifier.share) == (0, 1)
    assert set(classifier.terms) == {"ce", "local_kd", "regression"}
    assert all(classifier.terms[name].loss.needs_training_set for name in ("local_kd", "regression"))


def test_regression_is_least_where_a_linear_map_gives_the_centred_teacher():
    loss = EmbeddingRegressionLoss(4, 6).double()
    teacher = 5 + torch.randn(50, 6, dtype=torch.float64)
    loss.precompute(teacher, torch.zeros(50))
    student = (teacher - teacher.mean(0))[:, :4]
    with torch.no_grad():
        loss.projector.bias.zero_()
        # The least-squares map; what it cannot reach of the two other dimensions remains.
        loss.projector.weight.copy_(torch.linalg.lstsq(student, teacher - teacher.mean(0)).solution.T)
    best = loss(student, teacher, torch.zeros(50))
    with torch.no_grad():
        loss.projector.weight.mul_(-1)
    assert 0 <= best < 1 < loss(student, teacher, torch.zeros(50))
    assert torch.isclose(misalignment(teacher, 3 * teacher), torch.zeros((), dtype=torch.float64))


def test_centring_subtracts_the_mean_of_the_training_set_first():
    logits, teacher = torch.randn(12, 4, dtype=torch.float64), 3 + torch.randn(12, 5, dtype=torch.float64)
    labels, everything = torch.arange(12) % 4, 3 + torch.randn(40, 5, dtype=torch.float64)
    for centers in ("batch", "leave-one-out", "global"):
        centered = LocalKDLoss(centers=centers, normalize=True, centered=True)
        plain = LocalKDLoss(centers=centers, normalize=True)
        centered.precompute(everything, torch.arange(40) % 4)
        plain.precompute(everything - everything.mean(0), torch.arange(40) % 4)
        torch.testing.assert_close(
            centered(logits, teacher, labels), plain(logits, teacher - everything.mean(0), labels)
        )
        again = LocalKDLoss(centers=centers, normalize=True, centered=True)
        again.load_state_dict(centered.state_dict())
        torch.testing.assert_close(again(logits, teacher, labels), centered(logits, teacher, labels))


def test_centring_without_a_mean_says_what_to_do():
    with pytest.raises(MethodError, match=r"no mean of the training set yet; call precompute"):
        LocalKDLoss(centered=True)(torch.randn(4, 2), torch.randn(4, 3), torch.arange(4) % 2)


@pytest.mark.parametrize("returned", ["3", "[]", "None", "[1]", "{}"])
def test_a_method_that_returns_no_stages_is_refused(returned, tmp_path):
    (tmp_path / "mine.py").write_text(f"def mine(student, teacher, *, weight=1.0):\n    return {returned}\n")
    student = create_model("wrn_10_1", 3, image_size=8)
    method = load_method(str(tmp_path / "mine.py"))
    assert method.settle({"weight": "2"}) == {"weight": 2.0}
    with pytest.raises(MethodError, match="must return a list of one or more stages"):
        method.build(student, student, {})


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
def test_a_parameter_that_is_not_finite_is_refused(value):
    for name in ("kd_weight", "temperature", "trust"):
        with pytest.raises(MethodError, match=f"refilled.{name} must be a finite number"):
            load_method("refilled").settle({name: value})


NUMBERS = [
    (name, parameter)
    for name in list_methods()
    for parameter, kind in load_method(name).types.items()
    if kind in (int, float, int | None, float | None) and parameter != "hint"  # a place in a list, from either end
]


@pytest.mark.parametrize(("name", "parameter"), NUMBERS)
def test_every_number_of_a_method_has_two_ends(name, parameter):
    for value in ("-1", str(10**30), "many", ""):
        with pytest.raises(MethodError, match=rf"{name}\.{parameter}( = .* is out of range; give |=.*: must be )"):
            load_method(name).settle({parameter: value})
    assert {"kd", "rkd", "self_training", "svm"} <= {name for name, _ in NUMBERS}


@pytest.mark.parametrize("share", ["2", "-0.1"])
def test_the_share_of_the_first_stage_is_a_share(share):
    student = create_model("wrn_10_1", 3, image_size=8)
    with pytest.raises(MethodError, match=rf"embedding_share = {share}\S* is out of range; give a number from"):
        load_method("refilled").build(student, student, {"embedding_share": share})
