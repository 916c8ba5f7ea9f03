"""Several teachers: each with its own terms, trust and cache; errors, resuming, and what the user is told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from ranks import Ranks
from refilled.cli.app import app
from refilled.compare.comparison import Comparison
from refilled.config import Run
from refilled.errors import MethodError, RefilledError, RunError
from refilled.methods import list_methods, load_method
from refilled.models import embedded_folder
from refilled.outputs import Outputs
from refilled.presets import with_preset
from refilled.runs.examination import SAMPLE_IMAGES
from refilled.runs.experiment import complete, distill, resume
from refilled.runs.teacher_caches import list_caches
from refilled.stages import Stage, Term, constant, of_several
from refilled.training.distributed import World
from refilled.training.journal import Interrupted
from refilled.training.progress import Display
from stopping import Stopping

LETTERS = "refilled/letters"
CODE = """
    import torch
    from torch import nn
    from torch.nn import functional as F

    ABOUT = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}

    def keys(x): return (1000 * x.double().flatten(1) @ torch.arange(1.0, x[0].numel() + 1).double()).long().tolist()

    class Noise(nn.Module):
        def forward(self, x):
            return torch.stack([torch.randn(16, generator=torch.Generator().manual_seed(k)) for k in keys(x)])

    class Pixels(nn.Module):
        def forward(self, x): return F.avg_pool2d(x[:, :1], 2).flatten(1)

    def noise(): return Noise(), ABOUT
    def pixels(): return Pixels(), ABOUT
    def plain(): return nn.Flatten(), ABOUT
    """

QUICK = Run(
    task="digits:5-9", student="wrn_10_1", shots=60, epochs=2, batch_size=32, precision="32-true", val=0.2, threads=1
)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "caches"))
    (tmp_path / "t.py").write_text(dedent(CODE))
    return f"{tmp_path}/t.py"


def good(*teachers, **changes):
    return replace(QUICK, **with_preset("good", {"teacher": teachers, **changes}))


def refilled(*words):
    return CliRunner().invoke(app, [*map(str, words), "--no-report"] if words[0] == "distill" else [*map(str, words)])


def fault(*words):
    """Return what a command says that ends in a user's error."""
    found = refilled(*words).exception
    assert isinstance(found, RefilledError)
    return str(found)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_records_and_shows_what_each_teacher_brought(file, tmp_path):
    out = tmp_path / "run"
    command = ["--preset", "good", "--no-guard", "--epochs", "2", "--shots", "20", "--threads", "1", "--student"]
    words = ["distill", "digits:5-9", "--teacher", LETTERS, "--teacher", f"{file}:pixels", *command, "wrn_10_1"]
    answer = CliRunner().invoke(app, [*words, "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    assert "teacher 1" in answer.output
    assert "teacher 2" in answer.output
    assert Run.from_toml((out / "run.toml").read_text()).teachers == (LETTERS, f"{file}:pixels")
    entry = log(out)[-1]
    for name in ("regression", "local_kd", "label_information", "prior"):
        assert {name, f"{name}@2"} <= entry.keys()
        assert f"{name}@3" not in entry
    assert entry["label_information"] != entry["label_information@2"]
    about = json.loads((out / "result.json").read_text())["teacher"]
    assert [(each["name"], each["embedding_dim"], each["weight"]) for each in about["teachers"]] == [
        (LETTERS, 128, 0.5),
        (f"{file}:pixels", 64, 0.5),
    ]
    assert [each["terms"] for each in about["teachers"]] == [
        ["local_kd", "regression"],
        ["local_kd@2", "regression@2"],
    ]
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert "What each teacher brought" in page
    assert f"regression@2 {entry['regression@2']:.4g}" in page
    assert f"label information {entry['label_information@2']:.3f}" in page
    assert f"--teacher {LETTERS} --teacher {file}:pixels" in page
    assert "letters" in card
    assert "pixels" in card


class Distance(nn.Module):
    def forward(self, seen, taught, labels):
        return (seen.mean() - taught.mean()).square()


def test_the_loss_is_cross_entropy_once_and_the_mean_over_the_teachers():
    def plan():
        far = Term(Distance(), constant(3.0), student="embedding", teacher="embedding")
        return [Stage("classifier", {"ce": Term(nn.CrossEntropyLoss()), "far": far})]

    (stage,) = of_several({0: plan(), 1: plan(), 2: plan()})
    assert list(stage.terms) == ["ce", "far", "far@2", "far@3"]
    seen = Outputs(torch.randn(4, 5), torch.randn(4, 8))
    taught = [Outputs(torch.zeros(4, 0), torch.randn(4, width) + width) for width in (2, 3, 7)]
    labels = torch.arange(4)
    total = sum(term.weight(0) * term(seen, taught[term.of], labels) for term in stage.terms.values())
    distances = [(seen.embedding.mean() - one.embedding.mean()).square() for one in taught]
    wanted = nn.functional.cross_entropy(seen.logits, labels) + 3.0 * torch.stack(distances).mean()
    assert torch.allclose(total, wanted)
    assert len({id(term.loss) for term in stage.terms.values()}) == 4  # no loss is shared


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"views": 2}], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["the first", "the second"])
def test_an_ignored_teacher_leaves_the_run_of_the_other_to_the_bit(file, tmp_path, first, changes):
    names = [f"{file}:noise", f"{file}:plain"]
    both = names if first else names[::-1]
    result = distill(good(*both, **changes), tmp_path / "both")
    distill(good(f"{file}:plain", **changes), tmp_path / "alone")
    assert same(weights(tmp_path / "both"), weights(tmp_path / "alone"))
    unnumbered = [{name.removesuffix("@2"): v for name, v in entry.items()} for entry in log(tmp_path / "both")]
    assert unnumbered == log(tmp_path / "alone")
    assert result.teacher["ignored"] is False
    assert [each["ignored"] for each in result.teacher["teachers"]] == [first, not first]
    assert sorted(each["weight"] for each in result.teacher["teachers"]) == [0.0, 1.0]
    (note,) = [note for note in result.data["notes"] if "tells your classes apart" in note]
    assert f"{file}:noise" in note


@pytest.mark.slow
def test_if_all_teachers_are_ignored_the_student_is_alone(file, tmp_path):
    (tmp_path / "u.py").write_text(dedent(CODE).replace("randn(16", "randn(24"))
    result = distill(good(f"{file}:noise", f"{tmp_path}/u.py:noise"), tmp_path / "ignored")
    distill(QUICK, tmp_path / "alone")
    assert same(weights(tmp_path / "ignored"), weights(tmp_path / "alone"))
    assert result.teacher["ignored"] is True


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"views": 2},
        {"method": "crd", "settings": {}, "cutmix": 1.0},
        {"unlabelled": "rest", "ema": 0.9},
    ],
    ids=str,
)
def test_a_stopped_run_resumes_exactly(file, tmp_path, changes):
    names = (f"{file}:pixels", LETTERS, f"{file}:plain")
    run = replace(good(*names, **{"guard": False, **changes}), shots=30)
    whole = distill(run, tmp_path / "whole")
    with pytest.raises(Interrupted):
        distill(run, tmp_path / "stopped", display=Stopping(5), seconds_between_saves=0)
    resumed = resume(tmp_path / "stopped", named={"teacher": names})
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    assert log(tmp_path / "stopped") == log(tmp_path / "whole")
    assert resumed.teacher == whole.teacher


@pytest.mark.slow
def test_resuming_names_each_file_again(file, tmp_path):
    teachers = ["--teacher", LETTERS, "--teacher", f"{file}:pixels"]
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        distill(good(LETTERS, f"{file}:pixels"), out, display=Stopping(3))
    assert f"--teacher {LETTERS} --teacher {file}:pixels" in fault("distill", "--resume", out)
    said = fault("distill", "--resume", out, *teachers[2:])
    assert f"was started with teacher {LETTERS}, {file}:pixels, not {file}:pixels" in said
    assert refilled("distill", "--resume", out, *teachers).exit_code == 0


@pytest.mark.slow
def test_teachers_that_moved_are_found_where_a_grid_names_them(file, tmp_path):
    run = good(f"{file}:pixels", f"{file}:plain", epochs=1)
    with pytest.raises(Interrupted):
        distill(run, tmp_path / "run", display=Stopping(3))
    (tmp_path / "new").mkdir()
    moved = shutil.move(file, tmp_path / "new" / "t.py")
    complete(replace(run, teacher=(f"{moved}:pixels", f"{moved}:plain")), tmp_path / "run")
    recorded = Run.from_toml((tmp_path / "run" / "run.toml").read_text())
    assert recorded.teachers == (f"{moved}:pixels", f"{moved}:plain")


@pytest.mark.slow
def test_another_teacher_leaves_the_cache_of_the_first_as_it_is(file, tmp_path):
    distill(good(f"{file}:pixels", views=2, guard=False), tmp_path / "one")
    (cache,) = list_caches()
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("view*")}
    result = distill(good(f"{file}:plain", f"{file}:pixels", views=2, guard=False), tmp_path / "two")
    assert len(list_caches()) == 2
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("view*")} == before
    for each in result.teacher["teachers"]:
        assert each["cache"]["largest_difference"] < 1e-5


def test_one_teacher_is_the_same_run_in_a_list(file):
    assert good(LETTERS) == replace(good(), teacher=LETTERS)
    assert good() == replace(good(), teacher=None)
    assert Run.from_toml(good(LETTERS, f"{file}:pixels").to_toml()) == good(LETTERS, f"{file}:pixels")


def test_the_same_teacher_twice_is_refused(file, tmp_path):
    out = ["--epochs", 1, "--out", tmp_path / "run"]
    said = fault("distill", "digits:5-9", "--teacher", LETTERS, "--teacher", LETTERS, *out)
    assert f"the teacher {LETTERS} is named twice" in said
    copy = shutil.copytree(embedded_folder(LETTERS), tmp_path / "copy")
    said = fault("distill", "digits:5-9", "--teacher", LETTERS, "--teacher", copy, *out)
    assert "are the same network; leave one out" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_networks_without_weights_are_told_apart_by_what_they_return(file, tmp_path):
    """Their caches cannot be, and would hold the answers of the other."""
    (tmp_path / "u.py").write_text(dedent(CODE).replace("x[:, :1]", "x[:, :1] ** 2"))
    (tmp_path / "copy.py").write_text(dedent(CODE))
    pixels, squares, copy = f"{file}:pixels", f"{tmp_path}/u.py:pixels", f"{tmp_path}/copy.py:pixels"
    distill(good(pixels, squares, guard=False, epochs=1), tmp_path / "run")
    with pytest.raises(RunError, match=r"their caches cannot be told apart; leave out --views"):
        distill(good(pixels, squares, guard=False, views=2), tmp_path / "cached")
    with pytest.raises(RunError, match="are the same network; leave one out"):
        distill(good(pixels, copy, guard=False), tmp_path / "same")


@pytest.mark.parametrize("method", ["linear_probe", "nearest_neighbour", "svm", "fine_tune"])
def test_methods_that_work_in_the_teachers_network_take_one(file, tmp_path, method):
    with pytest.raises(MethodError, match=rf"'{method}' works in the network of one teacher, but 2 are named"):
        distill(replace(QUICK, method=method, teacher=(LETTERS, f"{file}:pixels")), tmp_path / "run")


@pytest.mark.slow
def test_a_method_that_compares_logits_says_which_teacher_has_other_classes(teacher, tmp_path):
    run = replace(QUICK, task="digits:0-4", method="kd", teacher=(teacher, LETTERS))
    with pytest.raises(MethodError, match=r"teacher 2: 'kd' compares logits class by class"):
        distill(run, tmp_path / "run")


def test_a_size_is_measured_for_one_teacher(file, tmp_path):
    teachers = ["--teacher", LETTERS, "--teacher", f"{file}:pixels", "--teacher-size", "auto"]
    said = fault("distill", "digits:5-9", *teachers, "--out", tmp_path / "run")
    assert "--teacher-size auto measures one teacher" in said


@pytest.mark.slow
def test_a_forecast_counts_each_teacher(file, tmp_path):
    words = ["distill", "digits:5-9", "--preset", "good", "--views", 2, "--epochs", 2, "--student", "wrn_10_1"]
    found = [
        json.loads(refilled(*words, "--dry-run", "--json", *teachers).stdout)
        for teachers in (["--teacher", LETTERS], ["--teacher", LETTERS, "--teacher", f"{file}:pixels"])
    ]
    assert {name for name in found[0]["rates"] if "teacher" in name} == {"teacher"}
    assert {name for name in found[1]["rates"] if "teacher" in name} == {"teacher 1", "teacher 2"}
    seen = found[1]["size"]["train"]
    images = 3 * seen + min(seen, SAMPLE_IMAGES)  # two views, for the losses, and to judge the teacher
    each = sum(images / found[1]["rates"][name] for name in ("teacher 1", "teacher 2"))
    assert found[1]["seconds"]["embedding by the teacher"] == pytest.approx(each)


def test_a_row_of_a_comparison_takes_a_list():
    comparison = Comparison.from_toml(
        f"""
        title = "One or two"
        seeds = [0]
        [run]
        task = "digits:5-9"
        student = "wrn_10_1"
        teacher = "{LETTERS}"
        [rows]
        vanilla = {{ method = "vanilla" }}
        one = {{ preset = "good" }}
        two = {{ preset = "good", teacher = ["{LETTERS}", "t.py:pixels"] }}
        """
    )
    teachers = {name: row[0].teacher for name, row in comparison.grid(Path()).items()}
    assert teachers == {"vanilla": None, "one": LETTERS, "two": (LETTERS, "t.py:pixels")}


def train_in_parallel(world: World, run: Run, folder: Path) -> dict[str, torch.Tensor]:
    from refilled.runs.experiment import begin
    from refilled.runs.folder import RunFolder
    from refilled.runs.prepared import Prepared, resolve

    run_folder = RunFolder(folder)
    world.lead(lambda: folder.mkdir(parents=True))
    prepared = Prepared(resolve(run))
    begin(prepared, run_folder, Display(), 60.0, world)
    return dict(prepared.student.state_dict())


@pytest.mark.slow
def test_two_processes_train_with_two_teachers_as_one_does(file, tmp_path):
    run = good(LETTERS, f"{file}:pixels", guard=False, precision="64-true", epochs=1)
    distill(run, tmp_path / "alone")
    two = Ranks(2)
    try:
        first, second = two(train_in_parallel, run, tmp_path / "two")
    finally:
        two.close()
    assert same(first, second)
    alone = weights(tmp_path / "alone")
    assert all(torch.allclose(first[name], alone[name], rtol=1e-6, atol=1e-8) for name in alone)


def test_every_method_takes_two_teachers_or_says_why_not(teacher, tmp_path):
    from refilled.models import create_model, load_teacher

    student = create_model("wrn_10_1", 5, image_size=16)
    teachers = {0: load_teacher(teacher), 1: load_teacher(teacher)}
    student.class_names = teachers[0].class_names
    for name in list_methods():
        method = load_method(name)
        if method.ignores_teacher:
            continue
        if not method.takes_student:
            with pytest.raises(MethodError, match="works in the network of one teacher"):
                method.build_for(None, teachers, {})
            continue
        stages = method.build_for(student, teachers, {})
        read = [term.of for stage in stages for term in stage.terms.values() if term.teacher is not None]
        assert read.count(0) == read.count(1)
