"""The losses of the baselines equal their formulas written out, and serve every pair of networks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from refilled.config import Run
from refilled.errors import MethodError
from refilled.losses.distances import unit_rows
from refilled.losses.feature_maps import paired_channels, paired_maps, same_size
from refilled.methods import load_method
from refilled.methods.at import AttentionLoss
from refilled.methods.crd import ContrastiveLoss, contrast
from refilled.methods.dkd import DKDLoss, decoupled_kl
from refilled.methods.fitnet import HintLoss
from refilled.methods.kd import KDLoss, softened_kl, standardized
from refilled.methods.nst import mean_kernel, squared_discrepancy
from refilled.methods.sp import SimilarityPreservingLoss
from refilled.methods.vid import VariationalLoss, gaussian_nll
from refilled.models import create_model
from refilled.outputs import Outputs
from refilled.runs.experiment import carry_out, distill, resume
from refilled.runs.folder import RunFolder
from refilled.runs.prepared import Prepared, resolve
from refilled.stages import warm_up
from refilled.training.journal import Interrupted
from refilled.training.progress import Display
from stopping import Stopping

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32)
sides = st.integers(1, 5)
QUICK = Run(task="digits:5-9", student="wrn_10_1", epochs=2, batch_size=20, shots=8, threads=1, precision="32-true")
FEATURE_METHODS = ("fitnet", "at", "nst", "vid", "kd_vid", "sp")
LABELS = torch.arange(4) % 3


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def maps(*shapes, batch=4, seed=0, dtype=torch.float64):
    return tuple(normal(batch, *shape, seed=seed + n, dtype=dtype) for n, shape in enumerate(shapes))


def flat(feature_map):
    return feature_map.flatten(2).tolist()


def models(student, teacher):
    return [SimpleNamespace(feature_channels=channels) for channels in (student, teacher)]


def test_maps_are_paired_from_the_deep_end():
    assert paired_channels(*models((1, 2, 3), (1, 2, 4, 8, 16))) == [(1, 4), (2, 8), (3, 16)]
    assert paired_channels(*models((1, 2, 3), (7,))) == [(3, 7)]
    student, teacher = maps((1, 8, 8), (2, 4, 4), (3, 2, 2)), maps((5, 4, 4), (6, 2, 2))
    pairs = paired_maps(student, teacher)
    assert [(s.shape[1], t.shape[1]) for s, t in pairs] == [(2, 5), (3, 6)]
    assert torch.equal(pairs[0][0], student[1])
    assert torch.equal(pairs[1][1], teacher[1])


def test_the_larger_map_is_averaged_down_to_the_smaller():
    large, small = normal(2, 3, 4, 6), normal(2, 5, 2, 3)
    blocks = torch.stack([large[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
    for first, second in ((large, small), (small, large)):
        for was, now in zip((first, second), same_size(first, second), strict=True):
            torch.testing.assert_close(now, blocks if was is large else small)
    wide, tall = same_size(normal(2, 3, 2, 6), normal(2, 3, 6, 2))
    assert wide.shape == tall.shape == (2, 3, 2, 2)


@few
@given(st.integers(1, 4), st.integers(1, 4), sides, seeds)
def test_attention_transfer_is_that_of_the_loop(student_channels, teacher_channels, side, seed):
    (student,), (teacher,) = (
        maps((student_channels, side, 2), seed=seed),
        maps((teacher_channels, side, 2), seed=seed + 1),
    )
    expected = reference.attention_distance(flat(student), flat(teacher))
    assert AttentionLoss()((student,), (teacher,), LABELS).item() == pytest.approx(expected)


@few
@given(st.integers(1, 6), st.integers(1, 6), sides, seeds)
def test_neuron_selectivity_is_that_of_the_loop(student_channels, teacher_channels, side, seed):
    (student,), (teacher,) = (
        maps((student_channels, side, 2), seed=seed),
        maps((teacher_channels, side, 2), seed=seed + 1),
    )
    expected = reference.mean_discrepancy(flat(student), flat(teacher))
    assert squared_discrepancy(student, teacher).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("channels", "places"), [((3, 2), 25), ((9, 11), 4)], ids=["by channels", "by places"])
def test_the_mean_kernel_and_its_gradient_are_those_of_all_pairs(channels, places):
    a, b = (normal(2, c, places).requires_grad_() for c in channels)
    all_pairs = (a[:, :, None] * b[:, None]).sum(3).square().mean((1, 2))
    torch.testing.assert_close(mean_kernel(a, b), all_pairs)
    found = torch.autograd.grad(mean_kernel(a, b).sum(), (a, b))
    torch.testing.assert_close(found, torch.autograd.grad(all_pairs.sum(), (a, b)))


def test_no_part_of_selectivity_is_left_out_of_the_gradient():
    student, teacher = normal(2, 3, 2, 2).requires_grad_(), normal(2, 4, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda maps: squared_discrepancy(maps, teacher), student)


def test_selectivity_never_holds_channels_by_channels_by_places():
    held = []

    def note(tensor):
        held.append(tensor.numel())
        return tensor

    batch, channels, side = 2, 64, 16
    student, teacher = (normal(batch, channels, side, side, seed=n, dtype=torch.float32) for n in (0, 1))
    student.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, note):
        squared_discrepancy(student, teacher).backward()
    assert max(held) <= batch * channels * side**2


@few
@given(st.integers(2, 7), seeds, st.floats(0.5, 8))
def test_decoupled_distillation_is_that_of_the_loop(classes, seed, temperature):
    logits, teacher = 3 * normal(5, classes, seed=seed), 3 * normal(5, classes, seed=seed + 1)
    labels = torch.arange(5) % classes
    found = [value.item() for value in decoupled_kl(logits, teacher, labels, temperature)]
    assert found == pytest.approx(
        reference.decoupled(logits.tolist(), teacher.tolist(), labels.tolist(), temperature), rel=1e-6, abs=1e-12
    )


def test_decoupled_parts_add_up_to_ordinary_distillation():
    # KD = TCKD + (1 - p_t) NCKD, image by image.
    logits, teacher, label = normal(1, 6), normal(1, 6, seed=1), torch.tensor([2])
    target, others = decoupled_kl(logits, teacher, label, 4.0)
    not_target = 1 - (teacher / 4).softmax(1)[0, 2]
    torch.testing.assert_close(target + not_target * others, softened_kl(logits, teacher, 4.0))


def test_decoupled_distillation_stays_finite_when_both_models_are_sure():
    logits = torch.tensor([[200.0, 0.0, 1.0]], requires_grad=True)
    loss = DKDLoss()(logits, torch.tensor([[300.0, 2.0, -1.0]]), torch.tensor([0]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad.any()


def test_the_weight_of_decoupled_distillation_warms_up():
    (stage,) = load_method("dkd").build(*pair_of_shapes(), {"warmup_epochs": 4})
    assert [stage.terms["dkd"].weight(epoch) for epoch in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [warm_up(3.0, 0)(epoch) for epoch in range(2)] == [3, 3]


@few
@given(st.integers(1, 6), seeds)
def test_similarity_preservation_is_that_of_the_loop(batch, seed):
    student, teacher = normal(batch, 3, 2, 2, seed=seed), normal(batch, 5, seed=seed + 1)
    expected = reference.similarity_distance(student.flatten(1).tolist(), teacher.tolist())
    found = SimilarityPreservingLoss()((normal(batch, 2), student), teacher, LABELS)
    assert found.item() == pytest.approx(expected)


def test_similarity_preservation_reads_the_embedding_on_request():
    (stage,) = load_method("sp").build(*pair_of_shapes(feature_channels=()), {"of": "embedding"})
    assert (stage.terms["similarity"].student, stage.terms["similarity"].teacher) == ("embedding", "embedding")


@few
@given(st.integers(1, 6), st.integers(1, 9), seeds, st.floats(0.05, 2))
def test_contrastive_transfer_is_that_of_the_loop(batch, images, seed, temperature):
    student, teacher, bank = (unit_rows(normal(n, 5, seed=seed + n)) for n in (batch, batch, images))
    labels, bank_labels = torch.arange(batch) % 3, torch.arange(images) % 4
    found = contrast(student, teacher, labels, bank, bank_labels, temperature).item()
    rows = (student.tolist(), teacher.tolist(), labels.tolist(), bank.tolist(), bank_labels.tolist())
    assert found == pytest.approx(reference.contrast(*rows, temperature), rel=1e-6, abs=1e-9)


def test_contrastive_transfer_resumes_with_the_bank_it_had():
    before, after, empty = (ContrastiveLoss(6, 5) for _ in range(3))
    before.precompute(normal(9, 5), torch.arange(9) % 3)
    after.load_state_dict(before.state_dict())
    batch = (normal(4, 6), normal(4, 5), torch.arange(4) % 3)
    assert after(*batch) == before(*batch)
    with pytest.raises(MethodError, match=r"precompute\(teacher_embedding, labels\)"):
        empty(*batch)


def test_standardized_logits_are_z_scores():
    logits = normal(6, 5) * 7 + 3
    torch.testing.assert_close(
        standardized(logits), (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)
    )
    assert not standardized(torch.ones(2, 5)).any()


def test_standardized_distillation_does_not_see_shift_and_scale():
    loss, student, teacher = KDLoss(2.0, standardize=True), normal(6, 5), normal(6, 5, seed=1)
    torch.testing.assert_close(loss(4 * student + 1, teacher, LABELS), loss(student, 9 * teacher - 2, LABELS))
    assert loss(3 * teacher + 5, teacher, LABELS).item() == pytest.approx(0, abs=1e-12)
    plain = KDLoss(2.0)
    assert plain(4 * student + 1, teacher, LABELS) != pytest.approx(plain(student, teacher, LABELS).item())


def test_the_gaussian_likelihood_is_that_of_torch():
    mean, target, variance = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1), torch.tensor([0.5, 2.0, 7.0]).double()
    expected = F.gaussian_nll_loss(mean, target, variance[:, None, None].expand_as(mean))
    torch.testing.assert_close(gaussian_nll(mean, target, variance), expected)


def test_the_variances_begin_at_5_and_go_where_the_errors_are():
    torch.manual_seed(0)
    loss = VariationalLoss([(3, 4)])
    torch.testing.assert_close(loss.variances[0], torch.full((4,), 5.0))
    student = maps((3, 4, 4), batch=32, dtype=torch.float32)
    noise = torch.tensor([0.3, 1.0, 2.0, 3.0])[:, None, None] * normal(32, 4, 4, 4, seed=3, dtype=torch.float32)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss(student, (noise,), LABELS).backward()
        optimizer.step()
    # Nothing of the noise can be predicted, so that the best variance is its own.
    torch.testing.assert_close(loss.variances[0], noise.var((0, 2, 3)), rtol=0.25, atol=0.3)


def test_the_hint_is_least_where_the_regressor_is_right():
    torch.manual_seed(0)
    loss = HintLoss(2, 3, hint=2).double()
    student = maps((2, 4, 4), (9, 2, 2))
    teacher = (F.relu(loss.norm(loss.convolution(student[0]))), normal(4, 9, 2, 2))
    assert loss(student, teacher, LABELS).item() == pytest.approx(0, abs=1e-12)
    moved = (teacher[0] + 2, teacher[1])
    assert loss(student, moved, LABELS).item() == pytest.approx(4)


def pair_of_shapes(**changes):
    shape = SimpleNamespace(embedding_dim=8, feature_channels=(4, 8), num_classes=3, class_names=("a", "b", "c"))
    return shape, SimpleNamespace(**{**vars(shape), **changes})


def test_kd_vid_is_the_sum_of_both():
    (stage,) = load_method("kd_vid").build(*pair_of_shapes(), {"kd_weight": 2.0, "vid_weight": 3.0, "ce_weight": 0.5})
    assert {name: term.weight(0) for name, term in stage.terms.items()} == {"ce": 0.5, "kd": 2.0, "vid": 3.0}


@pytest.mark.parametrize("name", FEATURE_METHODS)
@pytest.mark.parametrize("silent", [0, 1], ids=["student", "teacher"])
def test_a_model_without_feature_maps_is_refused_before_training(name, silent):
    shapes = list(pair_of_shapes())
    shapes[silent] = SimpleNamespace(**{**vars(shapes[silent]), "feature_channels": ()})
    with pytest.raises(MethodError, match=f"the {['student', 'teacher'][silent]} has none: .*use refilled, rkd"):
        load_method(name).build(*shapes, {})


@pytest.mark.parametrize("hint", [0, 3])
def test_a_hint_that_does_not_exist_is_refused(hint):
    with pytest.raises(MethodError, match=rf"fitnet.hint={hint}: there are 2 pairs of feature maps"):
        load_method("fitnet").build(*pair_of_shapes(), {"hint": hint})


NETWORKS = ("wrn_10_1", "resnet8", "mobilenet_0.25", "timm/test_resnet", "timm/test_vit")


@pytest.fixture(scope="module")
def said():
    """Each network as student and as teacher, and what the two say about the same images."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    found = {}
    for role in ("student", "teacher"):
        for name in NETWORKS:
            model = create_model(name, 3, image_size=64)
            model.class_names = ("a", "b", "c")
            with torch.no_grad():
                found[role, name] = model, model(images, features=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("teacher", NETWORKS)
@pytest.mark.parametrize("student", NETWORKS)
def test_every_pair_of_families_serves_every_feature_method(said, student, teacher):
    (small, seen), (large, taught) = said["student", student], said["teacher", teacher]
    seen = Outputs(seen.logits, seen.embedding, tuple(f.clone().requires_grad_() for f in seen.features))
    for method in FEATURE_METHODS:
        (stage,) = load_method(method).build(small, large, {})
        (term,) = (term for term in stage.terms.values() if term.student == "features")
        loss = term(seen, taught, LABELS)
        assert loss.isfinite()
        learnt = [*term.loss.parameters(), seen.features[-2 if method == "fitnet" else -1]]
        for gradient in torch.autograd.grad(loss, learnt):
            assert gradient.isfinite().all()
            assert gradient.any(), f"{method}: a part learns nothing"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    distill(replace(QUICK, student="wrn_10_2"), folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_what_a_loss_learns_is_trained_and_survives_an_interruption(teacher, tmp_path, name):
    run = resolve(replace(QUICK, teacher=teacher, method=name))
    prepared = Prepared(run)
    losses = [term.loss for term in prepared.stages[0].terms.values()]
    before = [parameter.detach().clone() for loss in losses for parameter in loss.parameters()]
    distil_prepared(prepared, tmp_path / "whole")
    after = [parameter for loss in losses for parameter in loss.parameters()]
    assert not any(torch.equal(was, now) for was, now in zip(before, after, strict=True))
    with pytest.raises(Interrupted):
        distill(run, tmp_path / "stopped", display=Stopping(1))
    resume(tmp_path / "stopped")
    for file in ("model.safetensors", "log.jsonl"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def distil_prepared(prepared, folder):
    folder.mkdir()
    carry_out(prepared, RunFolder(folder), Display(), 60)


@pytest.fixture
def peers():
    """The losses of torchdistill, which read their tensors out of nested dictionaries."""
    return pytest.importorskip("torchdistill.losses.mid_level", reason="torchdistill is not installed")


def as_output(**tensors):
    return {path: {"output": tensor} for path, tensor in tensors.items()}


def paths(*names):
    return {name: {role: {"io": "output", "path": name} for role in ("student", "teacher")} for name in names}


def test_attention_transfer_is_that_of_torchdistill(peers):
    student, teacher = maps((3, 4, 4), (5, 2, 2)), maps((4, 4, 4), (6, 2, 2), seed=9)
    theirs = peers.ATLoss(paths("a", "b"), mode="code")
    expected = theirs(as_output(a=student[0], b=student[1]), as_output(a=teacher[0], b=teacher[1]))
    torch.testing.assert_close(AttentionLoss()(student, teacher, LABELS), expected)


def test_variational_distillation_is_that_of_torchdistill(peers):
    torch.manual_seed(0)
    loss = VariationalLoss([(3, 4)]).double()
    with torch.no_grad():
        loss.alphas[0].copy_(normal(4))
    (student,), (teacher,) = maps((3, 4, 4)), maps((4, 4, 4), seed=9)
    prediction = loss.means[0](student), loss.variances[0].view(1, -1, 1, 1)
    expected = peers.VIDLoss(paths("a"))(as_output(a=prediction), as_output(a=teacher))
    torch.testing.assert_close(loss((student,), (teacher,), LABELS), expected)


def test_standardized_distillation_is_that_of_torchdistill(peers):
    student, teacher = normal(6, 5), normal(6, 5, seed=1)
    theirs = peers.LogitStdKDLoss("a", "output", "a", "output", temperature=2.0, eps=0.0, alpha=0)
    expected = 2.0**2 * theirs(as_output(a=student), as_output(a=teacher))
    torch.testing.assert_close(KDLoss(2.0, standardize=True)(student, teacher, LABELS), expected)
