"""A run and its images stay together, on the commands that a user types."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from refilled.cli.app import app
from refilled.config import Run
from refilled.errors import RunError
from refilled.runs.experiment import complete, distill, resume
from refilled.runs.inference import evaluate
from refilled.training.journal import Interrupted
from refilled.training.progress import Display

STUDENT = ["--model", "mobilenet_0.25", "--precision", "32-true", "--threads", "1", "--quiet"]


def refilled(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def stripes(width: int, seed: int, side: int = 32) -> Image.Image:
    """Draw noise with stripes of this width, which is all that tells the classes apart."""
    pattern = np.roll(np.arange(32) // width % 2, seed % 7)
    noise = np.random.default_rng(100 * width + seed).integers(0, 60, (32, 32, 3))
    return Image.fromarray((noise + 150 * pattern[None, :, None]).astype(np.uint8)).resize((side, side), 0)


def draw(root: Path, images: int = 30, classes: str = "abc", side: int = 32, first: int = 0) -> Path:
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for seed in range(first, first + images):
            stripes(2**place, seed, side).save(root / name / f"{seed:03}.png")
    return root


class Stopping(Display):
    """Interrupts the run after some epochs."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs

    def epoch(self, entry):
        import os
        import signal

        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted(run: Run, folder: Path) -> None:
    with pytest.raises(Interrupted):
        distill(run, folder, display=Stopping(1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with images ``small`` and a student ``run`` that knows them."""
    home = tmp_path_factory.mktemp("trained")
    draw(home / "small")
    refilled("train", home / "small", *STUDENT, "--epochs", 30, "--batch-size", 16, "--out", home / "run")
    return home


@pytest.mark.slow
def test_a_student_is_scored_at_its_own_size_whatever_the_images_are(trained, tmp_path):
    own = evaluate(trained / "run")["accuracy"]
    assert own == 100
    large = draw(tmp_path / "large", side=224)  # the same pictures, enlarged
    assert json.loads(refilled("evaluate", trained / "run", large, "--json"))["accuracy"] == own


@pytest.mark.slow
def test_classes_are_matched_by_name_and_missing_ones_are_named(trained, tmp_path):
    folder = draw(tmp_path / "two", classes="abc")
    shutil.rmtree(folder / "a")
    said = refilled("evaluate", trained / "run", folder)
    assert "100.00 %" in said
    assert "no images of 1 class: a" in said
    (folder / "b").rename(folder / "zebra")
    with pytest.raises(RunError, match=r"classes that the student in .* does not know: zebra"):
        evaluate(trained / "run", str(folder))


@pytest.mark.slow
def test_scoring_images_that_were_trained_on_is_reported(trained, tmp_path):
    copy = tmp_path / "everything" / "test"
    shutil.copytree(trained / "small", copy)
    shutil.copytree(trained / "small", tmp_path / "everything" / "train")
    result = evaluate(trained / "run", str(tmp_path / "everything"))
    (note,) = result["notes"]
    images = json.loads((trained / "run" / "result.json").read_text())["data"]["images"]
    assert note.startswith(f"{images['train']} of 90 scored images were trained on")
    assert evaluate(trained / "run")["notes"] == []


@pytest.mark.slow
def test_an_added_picture_is_reported_and_moves_no_other(trained, tmp_path):
    home = tmp_path / "moved"
    shutil.copytree(trained, home)
    draw(home / "small", images=1, first=900)
    result = evaluate(home / "run", str(home / "small"))
    assert not any("trained on" in note for note in result["notes"])
    draw(trained / "small", images=1, first=900)
    try:
        (note,) = evaluate(trained / "run")["notes"]
    finally:
        for path in (trained / "small").glob("*/900.png"):
            path.unlink()
    assert note.startswith("the images are not those of the run: ")
    assert "/900.png" in note


@pytest.mark.slow
def test_a_run_is_scored_and_resumed_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "photos", images=8)
    run = Run(task="photos", student="mobilenet_0.25", epochs=2, threads=1)
    interrupted(run, tmp_path / "r")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = resume(tmp_path / "r")
    assert evaluate(tmp_path / "r")["accuracy"] == result.accuracy
    recorded = Run.from_toml((tmp_path / "r" / "run.toml").read_text())
    assert recorded.task == str(tmp_path / "photos")
    assert json.loads((tmp_path / "r" / "data.json").read_text())["image_size"] == 32


def test_a_run_is_not_resumed_on_other_images(tmp_path):
    draw(tmp_path / "photos", images=8)
    interrupted(Run(task=str(tmp_path / "photos"), student="mobilenet_0.25", epochs=3, threads=1), tmp_path / "r")
    stripes(1, 900).save(tmp_path / "photos" / "a" / "900.png")
    with pytest.raises(RunError, match=r"are not those that the run .* was started with: .*900\.png"):
        resume(tmp_path / "r")
    (tmp_path / "photos" / "a" / "900.png").unlink()
    (tmp_path / "photos").rename(tmp_path / "renamed")
    (tmp_path / "new").mkdir()
    (tmp_path / "renamed").rename(tmp_path / "new" / "photos")
    assert resume(tmp_path / "r", named={"task": str(tmp_path / "new" / "photos")}).data["images"]["train"] > 0


def test_two_data_roots_with_one_name_are_told_apart(tmp_path):
    draw(tmp_path / "one" / "photos", images=8)
    draw(tmp_path / "two" / "photos", images=8, first=50)
    run = Run(task="photos", student="mobilenet_0.25", epochs=1, threads=1, data_root=str(tmp_path / "one"))
    first = complete(run, tmp_path / "r")
    assert complete(run, tmp_path / "r") == first
    with pytest.raises(RunError, match="are not those that the run"):
        complete(Run(**{**vars(run), "data_root": str(tmp_path / "two")}), tmp_path / "r")


def test_touched_files_with_the_same_pictures_are_the_same_images(tmp_path):
    draw(tmp_path / "photos", images=6)
    run = Run(task=str(tmp_path / "photos"), student="mobilenet_0.25", epochs=1, threads=1)
    first = complete(run, tmp_path / "r")
    for path in (tmp_path / "photos").rglob("*.png"):
        path.write_bytes(path.read_bytes())
    assert complete(run, tmp_path / "r") == first


CANARY = """
from pathlib import Path
import torch
from torch import nn
from refilled.stages import Stage, Term

def mine(student, teacher):
    "Cross-entropy."
    with Path(r"{log}").open("a") as log:
        log.write("run ")
    return [Stage("classifier", {{"ce": Term(nn.CrossEntropyLoss())}})]
"""


@pytest.mark.slow
def test_a_run_from_a_stranger_executes_none_of_its_files(tmp_path):
    log, file = tmp_path / "log", tmp_path / "mine.py"
    file.write_text(CANARY.format(log=log))
    run = Run(task="digits:5-9", student="wrn_10_1", method=str(file), epochs=3, shots=4, threads=1)
    interrupted(run, tmp_path / "r")
    before = log.read_text()
    with pytest.raises(RunError, match=rf"would execute.*--resume \S+ --method {file}"):
        refilled("distill", "--resume", tmp_path / "r", "--quiet")
    assert log.read_text() == before
    refilled("distill", "--resume", tmp_path / "r", "--method", file, "--quiet")
    after = log.read_text()
    assert len(after) > len(before)
    refilled("evaluate", tmp_path / "r")
    refilled("distill", "digits:0-4", "--teacher", tmp_path / "r", "--student", "wrn_10_1", "--shots", 4, "--epochs", 1,
             "--threads", 1, "--quiet", "--out", tmp_path / "taught")  # fmt: skip
    assert log.read_text() == after


def test_another_method_cannot_be_slipped_in_when_resuming(tmp_path):
    interrupted(Run(task="digits:5-9", student="wrn_10_1", epochs=3, shots=4, threads=1), tmp_path / "r")
    with pytest.raises(RunError, match="was started with method vanilla, not rkd"):
        refilled("distill", "--resume", tmp_path / "r", "--method", "rkd", "--quiet")


@pytest.mark.slow
def test_what_a_crash_before_the_first_state_leaves_is_no_obstacle(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / ".run.toml.123.tmp").write_text("half")
    refilled("train", "digits:0-4", "--shots", 4, "--epochs", 1, *STUDENT, "--out", folder)
    assert not list(folder.rglob("*.tmp"))
    (folder / ".model.json.9.tmp").write_text("half")
    (folder / "stages").mkdir(exist_ok=True)
    (folder / "stages" / ".embedding.safetensors.9.tmp").write_text("half")
    refilled("train", "digits:0-4", "--shots", 4, "--epochs", 1, *STUDENT, "--overwrite", "--out", folder)
    assert not list(folder.rglob("*.tmp"))


def test_a_skipped_damaged_state_is_reported(tmp_path, capsys):
    run = Run(task="digits:5-9", student="wrn_10_1", epochs=4, shots=8, batch_size=10, threads=1)
    with pytest.raises(Interrupted):
        distill(run, tmp_path / "r", display=Stopping(2), seconds_between_saves=0.0)
    state = bytearray((tmp_path / "r" / "last.ckpt").read_bytes())
    state[100] ^= 1
    (tmp_path / "r" / "last.ckpt").write_bytes(state)
    told = []

    class Listening(Display):
        def message(self, text):
            told.append(text)

    result = resume(tmp_path / "r", display=Listening())
    assert any("last.ckpt is damaged" in text for text in told)
    assert any("last.ckpt is damaged" in note for note in result.data["notes"])
