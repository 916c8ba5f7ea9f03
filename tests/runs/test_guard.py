"""A guarded run: the same as the student alone where the teacher has nothing to teach, and as before where it has."""

import re
from dataclasses import replace
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.config import Run
from refilled.errors import RunError
from refilled.losses.trust import knows_less, label_information
from refilled.presets import with_preset
from refilled.runs.examination import Verdict, fault_beside_student
from refilled.runs.experiment import distill, resume
from refilled.training.journal import Interrupted
from stopping import Stopping

CODE = """
    import torch
    from torch import nn
    from torch.nn import functional as F

    ABOUT = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}

    def keys(x): return (1000 * x.double().flatten(1) @ torch.arange(1.0, x[0].numel() + 1).double()).long().tolist()
    def noise_of(x): return torch.stack([torch.randn(16, generator=torch.Generator().manual_seed(k)) for k in keys(x)])

    class Noise(nn.Module):
        '''No two images alike, and no order among them.'''
        def forward(self, x): return noise_of(x)

    class Blurred(nn.Module):
        '''The pixels, under so much noise that they tell less than themselves.'''
        def forward(self, x): return F.avg_pool2d(x[:, :1], 4).flatten(1) + noise_of(x) / 10

    class ByHeart(nn.Module):
        '''The labels of some images, and noise for all others.'''
        def __init__(self, known): super().__init__(); self.known = known
        def forward(self, x):
            known = [self.known.get(key) for key in keys(x)]
            told = [F.one_hot(torch.tensor(k or 0), 16) * (k is not None) for k in known]
            return 9 * torch.stack(told) + noise_of(x) * torch.tensor([[0.1 if k is not None else 1] for k in known])

    def noise(): return Noise(), ABOUT
    def blurred(): return Blurred(), ABOUT
    def pixels(): return nn.Flatten(), ABOUT
    def by_heart():
        from refilled.data import load_task
        train = load_task("digits:5-9", shots=60, val=0.2).train
        pixels = train.pixels[torch.arange(len(train))] / 255
        return ByHeart(dict(zip(keys(pixels), train.labels.tolist()))), ABOUT
    """

QUICK = Run(
    task="digits:5-9", student="wrn_10_1", shots=60, epochs=2, batch_size=32, precision="32-true", val=0.2, threads=1
)


@pytest.fixture
def good(tmp_path):
    """Runs of the preset with a teacher of the file."""
    (tmp_path / "t.py").write_text(dedent(CODE))

    def run(teacher, **changes):
        fields = with_preset("good", {"teacher": f"{tmp_path}/t.py:{teacher}", **changes})
        return replace(QUICK, **fields)

    return run


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


REASONS = {
    "noise": "no better than chance (label information 0.0",
    "blurred": "less well than the plain pixels do (label information 0.",
    "by_heart": "in the training images (label information 1.00), but not in the held-out images (0.0",
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"cutmix": 1.0, "ema": 0.9}, {"views": 2}], ids=str)
@pytest.mark.parametrize("teacher", REASONS)
def test_an_ignored_teacher_leaves_the_student_alone_to_the_bit(good, tmp_path, monkeypatch, teacher, changes):
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "caches"))
    result = distill(good(teacher, **changes), tmp_path / "guarded")
    distill(replace(QUICK, **changes), tmp_path / "alone")
    assert same(weights(tmp_path / "guarded"), weights(tmp_path / "alone"))
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("guarded", "alone")]
    assert logs[0] == logs[1]
    assert result.teacher["ignored"] is True
    (note,) = [note for note in result.data["notes"] if "tells your classes apart" in note]
    assert note.startswith(f"the teacher tells your classes apart {REASONS[teacher]}")
    assert note.endswith(": it will be ignored")


@pytest.mark.slow
def test_a_teacher_with_something_to_teach_is_used_as_without_the_guard(good, tmp_path):
    guarded = distill(good("pixels"), tmp_path / "guarded")  # as good as the pixels is good enough
    distill(good("pixels", guard=False), tmp_path / "not")
    distill(QUICK, tmp_path / "alone")
    assert guarded.teacher["ignored"] is False
    assert same(weights(tmp_path / "guarded"), weights(tmp_path / "not"))
    assert not same(weights(tmp_path / "guarded"), weights(tmp_path / "alone"))


@pytest.mark.slow
def test_a_student_that_starts_from_weights_needs_a_teacher_that_knows_more_than_these(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("refilled.runs.examination.fault_in", lambda *_: None)  # pixels know more of the digits
    warm = replace(QUICK, student=teacher, lr=0.01)
    found = distill(replace(warm, **with_preset("good", {"teacher": teacher})), tmp_path / "guarded")
    distill(warm, tmp_path / "alone")
    assert found.teacher["ignored"] is True
    (note,) = [note for note in found.data["notes"] if "tells your classes apart" in note]
    assert re.search(r"no better than your student does before training \(label information (0\.\d\d), .* \1\)", note)
    assert same(weights(tmp_path / "guarded"), weights(tmp_path / "alone"))


@pytest.mark.slow
def test_what_a_student_learned_of_these_very_classes_does_not_count_against_a_teacher(good, teacher, tmp_path):
    distill(QUICK, tmp_path / "older")  # knows the training images by heart
    found = distill(good("pixels", student=str(tmp_path / "older")), tmp_path / "run")
    assert found.teacher["ignored"] is False


def test_a_teacher_beside_a_student_must_know_much_more():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(40)

    def embedding(noise):
        return nn.functional.one_hot(labels, 8) + noise * torch.randn(200, 8, generator=generator)

    clear, vague = embedding(0.1), embedding(0.6)
    less_clear = torch.where(torch.arange(200)[:, None] % 4 == 0, clear, vague)
    assert fault_beside_student(clear, vague, labels) is None
    assert knows_less(vague, less_clear, labels)  # certainly, but not by much
    assert fault_beside_student(less_clear, vague, labels).startswith("hardly better than your student")
    assert fault_beside_student(vague, clear, labels).startswith("no better than your student")
    assert fault_beside_student(clear, clear, labels).startswith("no better than your student")


def test_chance_does_not_make_a_teacher_better_than_a_student(monkeypatch):
    monkeypatch.setattr("refilled.runs.examination._BEYOND_THE_STUDENT", 0.0)
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(5).repeat(8)
    one, other = (nn.functional.one_hot(labels, 8) + 0.5 * torch.randn(40, 8, generator=generator) for _ in "ab")
    assert label_information(one, labels) != label_information(other, labels)
    assert None not in (fault_beside_student(one, other, labels), fault_beside_student(other, one, labels))


@pytest.mark.slow
def test_without_the_guard_it_is_only_reported(good, tmp_path):
    result = distill(good("noise", guard=False), tmp_path / "run")
    assert result.teacher["ignored"] is False
    (note,) = [note for note in result.data["notes"] if "tells your classes apart" in note]
    assert note.endswith(". Such a teacher can hardly help")


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["noise", "pixels"])
def test_a_resumed_run_keeps_its_verdict_and_ends_exactly(good, tmp_path, monkeypatch, teacher):
    whole = distill(good(teacher), tmp_path / "whole")
    with pytest.raises(Interrupted):
        distill(good(teacher), tmp_path / "stopped", display=Stopping(5))
    found = Verdict.load(tmp_path / "stopped")
    assert found.ignored == (teacher == "noise")
    monkeypatch.setattr("refilled.runs.examination.judge", lambda *_: pytest.fail("judged a second time"))
    resumed = resume(tmp_path / "stopped", named={"teacher": f"{tmp_path}/t.py:{teacher}"})
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    assert (tmp_path / "stopped" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    assert resumed.teacher["ignored"] == whole.teacher["ignored"]
    assert resumed.data["notes"] == whole.data["notes"]


def test_a_damaged_verdict_is_named(good, tmp_path):
    with pytest.raises(Interrupted):
        distill(good("noise"), tmp_path / "run", display=Stopping(5))
    (tmp_path / "run" / "teacher.json").write_text("{")
    with pytest.raises(RunError, match=r"teacher.json is damaged: .*--overwrite"):
        resume(tmp_path / "run", named={"teacher": f"{tmp_path}/t.py:noise"})


def test_few_images_do_not_condemn_a_teacher(good, tmp_path):
    result = distill(good("noise", shots=2, val=0.0), tmp_path / "run")  # 10 images of 5 classes
    assert result.teacher["ignored"] is False


@pytest.mark.slow
@pytest.mark.parametrize("row", ["refilled:good", "refilled"])
def test_a_compared_preset_is_guarded_as_a_run_of_it_is(good, tmp_path, row):
    run = good("noise")
    flags = ("--teacher", run.teacher, "--student", "wrn_10_1", "--shots", 60, "--epochs", 1, "--seeds", 2)
    more = ("--methods", f"vanilla,{row}", "--threads", 1, "--out", tmp_path / "out")
    said = CliRunner().invoke(app, ["compare", "digits:5-9", *map(str, (*flags, *more))])
    assert said.exit_code == 0, said.output
    ignored = "The teacher was ignored in all runs" in " ".join(said.output.split())
    assert ignored == (row == "refilled:good")
