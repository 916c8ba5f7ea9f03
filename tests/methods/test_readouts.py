"""Methods without a student of their own: readouts of the teacher's embedding, and its fine-tuning."""

from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.svm import LinearSVC

from refilled.compare.page import RowResults, on_the_teacher, write_report
from refilled.config import Run
from refilled.errors import MethodError, ModelError, RunError
from refilled.methods import load_method
from refilled.models import create_model, load_model, load_teacher, save_model
from refilled.models.backbone import trainable_copy
from refilled.presets import PRESETS
from refilled.runs.experiment import distill, resume
from refilled.runs.inference import evaluate, open_classifier
from refilled.runs.prepared import Prepared, load_task_of, resolve
from refilled.runs.result import Result
from refilled.stages import Readout
from refilled.training.evaluation import predict

QUICK = Run(task="digits:5-9", student="wrn_10_1", epochs=3, batch_size=20, shots=12, threads=1, precision="32-true")
OURS_AND_THEIRS = {
    "nearest_neighbour": ({}, KNeighborsClassifier(n_neighbors=1)),
    "linear_probe": ({"C": 3.0}, LogisticRegression(C=3.0, max_iter=1000)),
    "svm": ({"C": 0.3}, LinearSVC(C=0.3, random_state=0)),
}
readouts = pytest.mark.parametrize("name", OURS_AND_THEIRS)


def reading(teacher: str, name: str, **changes: object) -> Run:
    return replace(QUICK, method=name, teacher=teacher, settings=OURS_AND_THEIRS[name][0], **changes)


def theirs(name, train, labels, embedding):
    return make_pipeline(Normalizer(), OURS_AND_THEIRS[name][1]).fit(train.numpy(), labels).predict(embedding.numpy())


def clusters(images, classes, seed=0):
    """Embeddings around one direction a class, of any length, and class ids that are not consecutive."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(classes, 16, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(images) % classes
    noise = torch.randn(images, 16, generator=generator)
    return torch.rand(images, 1, generator=generator) * 9 * (directions[labels] + 0.6 * noise), 3 * labels + 1


def classify(name, *tensors):
    plan = load_method(name).build(None, create_model("wrn_10_1", 2), OURS_AND_THEIRS[name][0])
    assert isinstance(plan, Readout)
    return plan.classify(*tensors)


@readouts
@pytest.mark.parametrize("classes", [2, 5])
def test_a_readout_is_that_of_scikit_learn(name, classes):
    (train, labels), (test, truth) = clusters(60, classes), clusters(1500, classes, seed=1)
    found = classify(name, train, labels, test)
    assert found.dtype == torch.int64
    assert found.tolist() == theirs(name, train.double(), labels, test.double()).tolist()
    assert (found == truth).double().mean() > 0.8


@readouts
def test_a_readout_sees_neither_the_order_nor_the_length_of_embeddings(name):
    (train, labels), (test, _) = clusters(60, 5), clusters(40, 5, seed=1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    expected = classify(name, train, labels, test)
    assert torch.equal(classify(name, train[order], labels[order], test), expected)
    assert torch.equal(classify(name, 5 * train, labels, test / 7), expected)


@pytest.mark.slow
@readouts
def test_a_run_scores_the_readout_of_its_teachers_embedding(teacher, tmp_path, name):
    run = reading(teacher, name)
    result = distill(run, tmp_path / "a")
    network, task = load_teacher(teacher), load_task_of(run)
    train, test = (predict(network, split.pixels).embedding for split in (task.train, task.test))
    right = theirs(name, train, task.train.labels, test) == task.test.labels.numpy()
    assert result.accuracy == pytest.approx(100 * right.mean())
    assert result.teacher["name"] == teacher
    assert result.parameters == sum(p.numel() for p in network.parameters())
    assert list(result.class_accuracies) == ["5", "6", "7", "8", "9"]
    (note,) = result.data["notes"]  # digits are easy for the pixels
    assert "less well than the plain pixels" in note


def test_a_readout_leaves_a_folder_like_any_run_but_for_the_student(teacher, tmp_path):
    result = distill(reading(teacher, "svm"), tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "run.toml",
        "data.json",
        "images.safetensors",
        "teacher.json",
        "log.jsonl",
        "result.json",
        "DONE",
        ".lock",
    }
    assert Run.from_toml((tmp_path / "a" / "run.toml").read_text()).student is None
    assert resume(tmp_path / "a") == Result.load(tmp_path / "a") == result
    (tmp_path / "a" / "DONE").unlink()
    (tmp_path / "a" / "result.json").unlink()
    again = resume(tmp_path / "a")
    assert replace(again, seconds=result.seconds) == result
    with pytest.raises(RunError, match="holds a finished run"):
        distill(reading(teacher, "svm"), tmp_path / "a")


def test_what_needs_a_student_says_that_there_is_none(teacher, tmp_path):
    distill(reading(teacher, "svm"), tmp_path / "a")
    for call in (evaluate, open_classifier):
        with pytest.raises(RunError, match=r"a holds no student: 'svm' reads the embedding of its teacher"):
            call(tmp_path / "a")


@pytest.mark.parametrize("name", ["linear_probe", "svm"])
def test_a_strength_that_makes_no_sense_is_refused(teacher, tmp_path, name):
    with pytest.raises(MethodError, match=rf"{name}\.C = -1\.0 is out of range; give more than 0"):
        distill(replace(reading(teacher, name), settings={"C": "-1"}), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_run_may_score_the_held_out_images_instead_of_the_test_images(teacher, tmp_path, monkeypatch):
    run = reading(teacher, "nearest_neighbour", score="val", val=0.25)
    task = load_task_of(run)
    hidden = replace(task, test=replace(task.test, pixels=None, labels=None))  # whoever looks at them fails
    monkeypatch.setattr("refilled.runs.prepared.load_task_of", lambda run: hidden)
    monkeypatch.setattr(
        "refilled.data.task.Split.__len__", lambda split: 0 if split.labels is None else len(split.labels)
    )
    network = load_teacher(teacher)
    train, val = (predict(network, split.pixels).embedding for split in (task.train, task.val))
    right = theirs("nearest_neighbour", train, task.train.labels, val) == task.val.labels.numpy()
    assert distill(run, tmp_path / "a").accuracy == pytest.approx(100 * right.mean())
    trained = distill(replace(QUICK, score="val", val=0.25), tmp_path / "b")
    assert trained.data["scored"] == "val"


def test_there_must_be_held_out_images_to_score(tmp_path):
    with pytest.raises(RunError, match="needs images that are held out; give --val above 0"):
        distill(replace(QUICK, score="val", val=0.0), tmp_path / "a")


@pytest.mark.slow
def test_the_page_takes_readouts_for_baseline_and_for_the_row_that_is_shown(teacher, tmp_path):
    runs = {"probe": reading(teacher, "linear_probe"), "alone": QUICK, "near": reading(teacher, "nearest_neighbour")}
    rows = [RowResults(name, [distill(run, tmp_path / name)], [tmp_path / name]) for name, run in runs.items()]
    write_report(tmp_path / "report.html", "Readouts", rows, rows[0], rows[-1], [on_the_teacher(rows[-1], rows[0])])
    assert "Nearest class mean in the teacher" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report.html").read_text().count("data:image/svg+xml") == 4


def test_fine_tuning_trains_all_of_a_copy_of_the_teacher(teacher, tmp_path):
    run = replace(QUICK, method="fine_tune", teacher=teacher, lr=0.01)
    prepared = Prepared(resolve(run))
    network = load_teacher(teacher)
    for name, weights in prepared.student.state_dict().items():
        assert name.startswith("classifier") or torch.equal(weights, network.state_dict()[name]), name
    result = distill(run, tmp_path / "a")
    student = load_model(tmp_path / "a")
    moved = [
        not torch.equal(w, network.state_dict()[n]) for n, w in student.named_parameters() if "classifier" not in n
    ]
    assert all(moved)
    assert student.class_names == ("5", "6", "7", "8", "9")
    assert torch.equal(student.mean, network.mean)
    assert result.teacher["name"] == teacher
    assert evaluate(tmp_path / "a")["accuracy"] == result.accuracy


def test_fine_tuning_with_the_papers_rate_begins_where_the_teacher_is_good(teacher, tmp_path):
    run = replace(QUICK, **{**PRESETS["fine_tune"], "epochs": 1}, teacher=teacher)
    tuned, probed = distill(run, tmp_path / "a"), distill(reading(teacher, "linear_probe"), tmp_path / "b")
    assert tuned.ncm_accuracy == pytest.approx(probed.ncm_accuracy, abs=5)


def test_a_timm_teacher_can_be_fine_tuned_and_saved(tmp_path):
    fresh = create_model("timm/test_resnet", 4)
    weights = {f"body.{n}": w for n, w in fresh.body.state_dict().items()}
    torch.save({n.removeprefix("body."): w for n, w in weights.items()}, tmp_path / "w.pth")
    teacher = load_teacher(f"timm/test_resnet:{tmp_path / 'w.pth'}")
    student = trainable_copy(teacher, ("a", "b", "c"), torch.Generator().manual_seed(0))
    student.image_size = 32
    save_model(student, tmp_path / "m")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        student.eval()
        torch.testing.assert_close(load_model(tmp_path / "m")(images), student(images))
        torch.testing.assert_close(student(images).embedding, teacher(images).embedding)
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_that_could_not_be_saved_is_not_fine_tuned(tmp_path):
    (tmp_path / "t.py").write_text(
        "import torch\ndef make():\n"
        "    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())\n"
        "    return net, {'mean': [0.5] * 3, 'std': [0.5] * 3}\n"
    )
    run = replace(QUICK, method="fine_tune", teacher=f"{tmp_path / 't.py'}:make")
    with pytest.raises(ModelError, match="a network from a Python file or from transformers cannot be fine-tuned"):
        distill(run, tmp_path / "a")
    assert distill(replace(run, method="svm"), tmp_path / "b").accuracy > 20  # reading it out is another matter


@pytest.mark.slow
def test_a_cache_is_made_only_if_a_stage_can_use_it(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    run = replace(QUICK, teacher=teacher, views=2)
    distill(replace(run, method="at"), tmp_path / "a")
    assert not (tmp_path / "cache").exists()
    distill(replace(run, method="sp", settings={"of": "embedding"}), tmp_path / "b")
    assert len(list((tmp_path / "cache").rglob("*.f32"))) == 2
