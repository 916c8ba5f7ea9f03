"""The training loop: it learns, it is exact, and what it must not touch stays as it was."""

import json
import math
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refilled.config import Run
from refilled.data import epoch_batches
from refilled.errors import NonFiniteError, RunError
from refilled.models import load_model
from refilled.recipe import Recipe
from refilled.runs.experiment import carry_out, complete, distill, resume
from refilled.runs.folder import RunFolder
from refilled.runs.inference import evaluate
from refilled.runs.prepared import Prepared, resolve
from refilled.runs.result import Result
from refilled.runs.teacher_caches import build_cache, fabric_of
from refilled.stages import Stage, Term
from refilled.training import loop as training
from refilled.training.cuda_graphs import GraphedNetwork
from refilled.training.journal import Interrupted, RunJournal
from refilled.training.loop import Journal, fit, views_of
from refilled.training.progress import Display
from refilled.training.schedule import learning_rate, share_epochs
from refilled.training.teacher_cache import VIEW_SEED
from soak import repetitions
from stopping import Stopping

QUICK = Run(task="digits:5-9", student="wrn_10_1", epochs=4, batch_size=20, shots=8, threads=1, precision="32-true")


def refilled(teacher: str, **changes: object) -> Run:
    return replace(QUICK, method="refilled", teacher=teacher, **changes)


def digest(folder: Path) -> str:
    """Of all that a repeated run must give again."""
    names = ("model.safetensors", "model.json", "log.jsonl", "stages/embedding.safetensors")
    return sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


@pytest.mark.slow
def test_a_teacher_learns_its_digits(teacher):
    assert Result.load(Path(teacher)).accuracy > 80


def test_the_folder_explains_itself(teacher, tmp_path):
    result = distill(refilled(teacher), tmp_path / "b")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {
        "run.toml",
        "data.json",
        "images.safetensors",
        "teacher.json",
        "log.jsonl",
        "result.json",
        "model.safetensors",
        "model.json",
        "stages",
        "DONE",
        ".lock",
    }
    assert Result.load(tmp_path / "b") == result
    run = Run.from_toml((tmp_path / "b" / "run.toml").read_text())
    assert run.settings["temperature"] == 2.0  # a default of the method, written down
    entries = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in entries] == ["embedding"] * 2 + ["classifier"] * 2
    assert all(math.isfinite(entry["lr"]) for entry in entries)
    assert load_model(tmp_path / "b").class_names == ("5", "6", "7", "8", "9")


def test_evaluating_a_student_gives_the_accuracy_of_its_run(teacher, tmp_path):
    result = distill(refilled(teacher), tmp_path / "b")
    again = evaluate(tmp_path / "b")
    assert again["accuracy"] == result.accuracy
    assert again["class_accuracies"] == result.class_accuracies


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"precision": "bf16-mixed"}, {"views": 2}, {"sampler": "balanced"}, {"mixup": 0.4}], ids=str
)
def test_the_same_run_twice_gives_the_same_bits(teacher, tmp_path, monkeypatch, changes):
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    for name in "ab":
        distill(refilled(teacher, **changes), tmp_path / name)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vanilla", "refilled", "regression", "rkd", "at", "fitnet", "vid"])
def test_what_is_recorded_is_what_the_losses_read(teacher, tmp_path, monkeypatch, name):
    """The way by CUDA graphs, with passes that are run instead of replayed: the rest of it needs no GPU."""
    run = replace(refilled(teacher), method=name, device="cpu")
    distill(run, tmp_path / "plain")
    monkeypatch.setattr(training, "can_be_graphed", lambda network, device, precision: True)
    monkeypatch.setattr(GraphedNetwork, "_record", lambda self, chosen, images: chosen)
    distill(run, tmp_path / "graphed")
    assert (tmp_path / "plain/log.jsonl").read_text() == (tmp_path / "graphed/log.jsonl").read_text()
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "graphed/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"views": 2, "cutmix": 1.0, "settings": {"centers": "global"}},
        {"auto_augment": "trivial", "color_jitter": 0.4, "random_erasing": 0.5},
    ],
    ids=str,
)
def test_a_run_stopped_at_any_step_resumes_exactly(teacher, tmp_path, monkeypatch, changes):
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    run = refilled(teacher, **changes)
    distill(run, tmp_path / "whole")
    for step in (1, 2, 3, 4, 5, 7, 8):  # two steps an epoch, two epochs a stage: begin, middle and end of each
        folder = tmp_path / str(step)
        with pytest.raises(Interrupted):
            distill(run, folder, display=Stopping(step))
        assert (folder / "last.ckpt").exists()
        resume(folder)
        assert digest(folder) == digest(tmp_path / "whole"), f"stopped after step {step}"


def test_a_run_of_an_earlier_version_is_not_resumed(teacher, tmp_path):
    """A parameter that the record lacks did not exist; its present default would change the run in the middle."""
    with pytest.raises(Interrupted):
        distill(refilled(teacher), tmp_path / "a", display=Stopping(1))
    record = tmp_path / "a" / "run.toml"
    record.write_text(record.read_text().replace('kd_average = "elements"\n', ""))
    with pytest.raises(RunError, match=r"without kd_average; resume with that version, or .*--overwrite"):
        resume(tmp_path / "a")
    assert (tmp_path / "a" / "last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device that cannot be used here")
def test_a_run_begun_elsewhere_resumes_here(teacher, tmp_path):
    """A state says nothing of the machine; the record does, and is changed with it."""
    run = refilled(teacher)
    distill(run, tmp_path / "whole")
    for folder, go_on in (
        (tmp_path / "a", lambda: resume(tmp_path / "a", where={"device": "cpu"})),
        (tmp_path / "b", lambda: complete(run, tmp_path / "b")),
    ):
        with pytest.raises(Interrupted):
            distill(run, folder, display=Stopping(3))
        record = folder / "run.toml"
        record.write_text(record.read_text().replace('device = "cpu"', 'device = "cuda"'))
        with pytest.raises(RunError, match="'cuda' cannot be used here, choose another with --device"):
            resume(folder)
        with pytest.raises(RunError, match="cannot change epochs when resuming; only data_root, "):
            resume(folder, where={"device": "cpu", "epochs": 1})
        go_on()
        assert digest(folder) == digest(tmp_path / "whole")
        assert record.read_text() == (tmp_path / "whole" / "run.toml").read_text()


@pytest.mark.slow
def test_a_run_killed_at_random_times_resumes_exactly(teacher, tmp_path):
    run = refilled(teacher, epochs=16, precision="bf16-mixed")
    distill(run, tmp_path / "whole")
    (tmp_path / "run.toml").write_text(run.to_toml())
    script = (
        "import sys; from pathlib import Path\nfrom refilled.config import Run\n"
        "from refilled.runs.experiment import *\n"
        "folder = Path(sys.argv[1])\n"
        "print('start', flush=True)\n"
        "if (folder / 'run.toml').exists(): resume(folder, seconds_between_saves=0)\n"
        "else: distill(Run.from_toml((folder.parent / 'run.toml').read_text()), folder, seconds_between_saves=0)"
    )
    chance = random.Random(0)
    kills = 0
    for number in range(repetitions("R1")):
        folder = tmp_path / f"killed-{number}"
        for _ in range(3):
            with subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", script, str(folder)], stdout=subprocess.PIPE
            ) as process:
                process.stdout.readline()
                while not (folder / "last.ckpt").exists() and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(chance.uniform(0, 0.4))
                kills += process.poll() is None
                process.kill()
            if (folder / "DONE").exists():
                break
        if not (folder / "DONE").exists():
            resume(folder)
        assert digest(folder) == digest(tmp_path / "whole")
        assert not list(folder.glob(".*.tmp"))
    assert kills > 0


@pytest.mark.slow
def test_a_run_with_a_damaged_state_resumes_from_the_previous_one_exactly(teacher, tmp_path):
    run = refilled(teacher)
    distill(run, tmp_path / "whole")
    with pytest.raises(Interrupted):
        distill(run, tmp_path / "b", display=Stopping(6), seconds_between_saves=0)
    last = tmp_path / "b" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    resume(tmp_path / "b")
    assert digest(tmp_path / "b") == digest(tmp_path / "whole")


def test_a_folder_is_never_overwritten_silently(teacher, tmp_path):
    with pytest.raises(Interrupted):
        distill(QUICK, tmp_path / "b", display=Stopping(3))
    with pytest.raises(RunError, match=r"unfinished run; resume it with 'refilled distill --resume .*/b'"):
        distill(QUICK, tmp_path / "b")
    resume(tmp_path / "b")
    before = digest_all(tmp_path / "b")
    with pytest.raises(RunError, match="finished run; choose another --out, or replace it with --overwrite"):
        distill(QUICK, tmp_path / "b")
    assert digest_all(tmp_path / "b") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(RunError, match="not empty"):
        distill(QUICK, tmp_path / "mine")
    (tmp_path / "b" / "notes.txt").write_text("keep")
    RunFolder(tmp_path / "b").overwrite()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [".lock", "notes.txt"]


def digest_all(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_training_changes_the_student_and_not_the_teacher(teacher, tmp_path):
    run = resolve(refilled(teacher, device="cpu"))
    prepared = Prepared(run)
    before = {name: value.clone() for name, value in prepared.teacher.state_dict().items()}
    student = {name: value.clone() for name, value in prepared.student.state_dict().items()}
    folder = tmp_path / "b"
    folder.mkdir()
    carry_out(prepared, RunFolder(folder), Display(), 60)
    after = prepared.teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not prepared.teacher.training
    assert not any(p.requires_grad for p in prepared.teacher.parameters())
    unchanged = [n for n, v in prepared.student.named_parameters() if torch.equal(v, student[n])]
    assert unchanged == []


class _Sees(nn.Module):
    """A loss that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, logits, taught, labels):
        self.calls.append((taught, labels))
        return F.cross_entropy(logits, labels)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("views", [None, 3])
def test_the_teacher_sees_the_mixture_and_labels_are_mixed_as_the_images_are(
    teacher, monkeypatch, tmp_path, kind, views
):
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    loss, entries = _Sees(), []

    class Log(Journal):
        def epoch(self, entry):
            entries.append(entry)

    run = resolve(refilled(teacher, views=views, device="cpu", **{kind: 1.0}))
    prepared = Prepared(run)
    task, fabric = prepared.task, fabric_of(run)
    cache = None if views is None else build_cache(run, say=lambda text: None)
    stages = [Stage("joint", {"sees": Term(loss, teacher="embedding")})]
    fit(prepared.student, prepared.teacher, task, stages, replace(run, epochs=2), fabric, Log(), cache)
    shown, every, shares = views_of(run, task), torch.arange(len(task.train)), set()
    batches = [
        batch
        for epoch in range(2)
        for batch in epoch_batches(task.train.labels, batch_size=run.batch_size, seed=run.seed, epoch=epoch)
    ]
    assert len(loss.calls) == 2 * len(batches) > 4  # each step under both kinds of labels
    for step, batch in enumerate(batches):
        (taught, labels), (again, others) = loss.calls[2 * step : 2 * step + 2]
        place = {"seed": run.seed, "view": step} if views is None else {"seed": VIEW_SEED, "view": step % views}
        with torch.no_grad():
            expected = prepared.teacher(shown.load(task.train.pixels, every, **place)).embedding
        torch.testing.assert_close(taught, expected[batch], rtol=1e-4, atol=1e-4)
        assert torch.equal(taught, again)
        assert torch.equal(labels, task.train.labels[batch])
        assert torch.equal(others, task.train.labels[shown.partners(every, len(every), **place)][batch])
        shares.add(shown.mixing(task.image_size, **place).share)
    assert len(shares) == (len(batches) if views is None else views)
    assert len(entries) == 2


class _Exploding(nn.Module):
    def __init__(self, after: int, gradient_only: bool) -> None:
        super().__init__()
        self.left, self.gradient_only = after, gradient_only

    def forward(self, logits, labels):
        self.left -= 1
        loss = nn.functional.cross_entropy(logits, labels)
        if self.left > 0:
            return loss
        return loss + (logits * 0).sum().sqrt() if self.gradient_only else loss * torch.nan


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_step_that_is_not_finite_is_not_taken(tmp_path, gradient_only):
    prepared = Prepared(resolve(QUICK))
    prepared.stages = [Stage("classifier", {"ce": Term(_Exploding(3, gradient_only))})]
    with pytest.raises(NonFiniteError, match=r"stage 'classifier', epoch 2, step 1.*The step was not taken"):
        carry_out(prepared, RunFolder(tmp_path), Display(), 60)
    assert all(parameter.isfinite().all() for parameter in prepared.student.parameters())


def test_epochs_are_shared_out_whole():
    def stages(*shares):
        return [Stage(str(share), {}, share=share) for share in shares]

    assert share_epochs(stages(1, 1), 10) == [5, 5]
    assert share_epochs(stages(0.5, 0.5), 5) == [3, 2]
    assert share_epochs(stages(0, 1), 7) == [0, 7]
    for shares in ((0.3, 0.3, 0.4), (1, 2, 3, 4), (0.1, 0.9)):
        for epochs in range(1, 30):
            assert sum(share_epochs(stages(*shares), epochs)) == epochs


def test_the_papers_schedule_falls_to_a_fifth_after_each_quarter():
    paper = Recipe(epochs=200, schedule="step", warmup=0)
    rates = [learning_rate(paper, 200, epoch) for epoch in (0, 49.9, 50, 99, 100, 150, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.0008, 0.0008])


def test_the_late_schedule_falls_to_a_tenth_at_epochs_150_180_and_210_of_240():
    recipe = Recipe(epochs=240, lr=0.05, schedule="late-step", warmup=0)
    rates = [learning_rate(recipe, 240, epoch) for epoch in (0, 149.9, 150, 180, 209, 210, 239)]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.0005, 0.0005, 0.00005, 0.00005])


def test_the_cosine_schedule_rises_and_falls():
    recipe = Recipe(warmup=2)
    rates = [learning_rate(recipe, 20, time / 10) for time in range(200)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(recipe.lr)
    assert top == 20
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


def test_the_journal_counts_time_over_all_starts(tmp_path):
    (tmp_path / "log.jsonl").touch()
    journal = RunJournal(tmp_path, Display())
    journal._seconds_before = 100.0
    assert 100 <= journal.seconds < 110


def test_an_interruption_travels_between_processes():
    arrived = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM)))
    assert (str(arrived), arrived.number) == ("SIGTERM", signal.SIGTERM)
