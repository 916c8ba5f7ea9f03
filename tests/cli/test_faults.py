"""Faults of the machine and hostile files: one sentence, the right exit code and no traceback."""

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from hashlib import sha256

import pytest
import torch
from safetensors.torch import save

import commands
from commands import a_list, directory, empty, noise
from refilled.cli import ending
from refilled.cli.app import main
from refilled.config import FewShotRun, MetaRun, Run
from refilled.errors import RefilledError, RunError
from refilled.files import write_atomic

TINY = ["--student", "wrn_10_1", "--shots", "4", "--epochs", "1", "--threads", "1", "--quiet"]


def call(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """Run the program in this process; return its exit code and what it says on standard error."""
    monkeypatch.setattr(sys, "argv", [])
    capsys.readouterr()
    return commands.call(*arguments), re.sub(r"\s+", " ", capsys.readouterr().err)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


HARMS = [empty, noise, directory, flipped, a_list]
FILES = ["run.toml", "result.json", "model.json", "model.safetensors", "data.json", "images.safetensors"]
READERS = {
    "evaluate": (["evaluate", "{run}"], {"run.toml", "model.json", "model.safetensors", "data.json"}),
    "predict": (["predict", "{run}", "{picture}"], {"model.json", "model.safetensors"}),
    "resume": (["distill", "--resume", "{run}", "--quiet"], {"result.json"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_of_a_finished_run_is_named(teacher, tmp_path, monkeypatch, capsys, file, harm):
    run = tmp_path / "run"
    shutil.copytree(teacher, run)
    harm(run / file)
    picture = tmp_path / "a.png"
    from PIL import Image

    Image.new("RGB", (8, 8)).save(picture)
    for arguments, needed in READERS.values():
        arguments = [a.format(run=run, picture=picture) for a in arguments]
        code, said = call(monkeypatch, capsys, *arguments)
        assert "Traceback" not in said
        if file in needed:
            assert code == 2, (arguments, said)
            assert str(run) in said
        else:
            assert code in (0, 2), said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensors", "data"),
    [
        ({}, {"position": {"stage": 0, "epoch": 0, "step": 0}, "lr": 0.1, "sums": []}),
        ({}, {}),
        ({}, {"position": {"place": 1}}),
        ({"student/stem.weight": torch.zeros(1)}, {"position": {"stage": 0, "epoch": 0, "step": 1}, "sums": ["x"]}),
    ],
    ids=["no tensors", "no position", "another position", "another network"],
)
def test_an_intact_state_of_another_run_is_refused(teacher, tmp_path, monkeypatch, capsys, tensors, data):
    run = tmp_path / "run"
    shutil.copytree(teacher, run)
    (run / "DONE").unlink()
    plain = torch.frombuffer(bytearray(json.dumps({"schema": 1, **data}).encode()), dtype=torch.uint8)
    body = save({**tensors, "state.json": plain})
    (run / "last.ckpt").write_bytes(body + sha256(body).digest())
    code, said = call(monkeypatch, capsys, "distill", "--resume", run, "--quiet")
    assert code == 2
    assert "the saved state belongs to another run" in said


@pytest.mark.parametrize("content", [b"", b"no state", save({"a": torch.zeros(1)})])
def test_a_state_with_a_correct_checksum_and_wrong_content_is_refused(teacher, tmp_path, monkeypatch, capsys, content):
    run = tmp_path / "run"
    shutil.copytree(teacher, run)
    (run / "DONE").unlink()
    (run / "last.ckpt").write_bytes(content + sha256(content).digest())
    code, said = call(monkeypatch, capsys, "distill", "--resume", run, "--quiet")
    assert code == 2
    assert "last.ckpt holds no training state" in said


def test_out_may_not_be_a_file(tmp_path, monkeypatch, capsys, photos):
    file = tmp_path / "file"
    file.write_text("mine")
    for command in (
        ["train", "digits:0-4", *TINY],
        ["fewshot", "--data", photos, "--n-shot", 1, "--n-query", 1, "--n-episodes", 1, "--quiet"],
        ["meta-train", "--data", photos, "--n-shot", 1, "--n-query", 1, "--n-way", 2, "--n-episodes", 1, "--quiet"],
    ):
        code, said = call(monkeypatch, capsys, *command, "--out", file)
        assert (code, file.read_text()) == (2, "mine"), said
        assert f"{file} is a file; choose another --out" in said


def test_a_name_that_is_too_long_is_explained(tmp_path, monkeypatch, capsys):
    code, said = call(monkeypatch, capsys, "train", "digits:0-4", *TINY, "--out", tmp_path / ("x" * 300))
    assert code == 2
    assert "the name is too long" in said


@pytest.mark.slow
def test_a_full_disk_is_reported_with_path_and_bytes_and_leaves_no_partial_file(tmp_path, monkeypatch, capsys):
    def full(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("refilled.files.os.fsync", full)
        code, said = call(patch, capsys, "train", "digits:0-4", *TINY, "--out", tmp_path / "run")
    assert code == 2
    assert re.search(rf"the disk is full: {tmp_path}/run/images.safetensors cannot be written, [\d,]+ bytes are", said)
    assert "Free some space" in said
    assert not list(tmp_path.rglob("*.tmp"))
    code, said = call(monkeypatch, capsys, "train", "digits:0-4", *TINY, "--out", tmp_path / "run")
    assert code == 0, said


def test_a_failed_write_names_its_file_and_size(tmp_path, monkeypatch):
    monkeypatch.setattr("refilled.files.os.fsync", lambda d: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full") as caught:
        write_atomic(tmp_path / "a", bytes(1234))
    assert "1,234 bytes are needed" in (ending.explain(caught.value) or "")


def test_a_folder_without_permission_is_explained(tmp_path, monkeypatch, capsys):
    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "run"))

    monkeypatch.setattr("pathlib.Path.mkdir", forbidden)
    code, said = call(monkeypatch, capsys, "train", "digits:0-4", *TINY, "--out", tmp_path / "run")
    assert code == 2
    assert "permission denied; grant read and write permission" in said


def test_an_out_of_memory_error_names_smaller_settings_and_a_defect_keeps_its_traceback():
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")):
        assert "--image-memory 0" in (ending.explain(error) or "")
    assert ending.explain(RuntimeError("shape mismatch")) is None
    assert ending.explain(KeyError("x")) is None


def test_debug_shows_where_a_fault_came_from(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["refilled", "--debug", "train", "digits:0-4", *TINY, "--out", str(tmp_path / ("x" * 300))]
    )
    with pytest.raises(OSError, match="too long"):
        main()


PHASES = {
    "loading": "refilled.runs.prepared.load_task",
    "scoring": "refilled.runs.experiment.measure",
    "concluding": "refilled.runs.experiment._conclude",
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_outside_the_training_loop_reports_what_remains(tmp_path, phase):
    module, _, name = PHASES[phase].rpartition(".")
    program = (
        f"import time, pathlib, {module} as m\n"
        f"def wait(*a, **k):\n    pathlib.Path('marker').touch()\n    time.sleep(60)\n"
        f"m.{name} = wait\nfrom refilled.cli.app import main\nmain()"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, "train", "digits:0-4", *TINY, "--out", "run"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "marker").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "Traceback" not in said
    assert "ended by SIGTERM" in said
    assert ("Repeat the command" if phase == "loading" else "refilled distill --resume run") in said
    assert not list(tmp_path.rglob("*.tmp"))


NUMBERS = {
    "0": ["epochs", "batch_size", "lr", "threads", "shots", "image_size", "teacher_size", "views", "images_per_class"],
    "-1": [
        *("epochs", "batch_size", "lr", "threads", "shots", "image_size", "teacher_size", "views", "val", "seed"),
        *("least_steps", "weight_decay", "warmup", "momentum", "ema", "mixup", "cutmix", "image_memory"),
        *("color_jitter", "random_erasing"),
    ],
    "40": ["color_jitter", "random_erasing"],
    "nan": [
        "color_jitter",
        "random_erasing",
        "lr",
        "weight_decay",
        "warmup",
        "momentum",
        "ema",
        "mixup",
        "cutmix",
        "image_memory",
        "val",
    ],
    "inf": ["lr", "weight_decay", "warmup", "momentum", "ema", "mixup", "cutmix", "image_memory", "val"],
    "1e308": ["momentum", "ema", "image_memory", "val"],
}


@pytest.mark.parametrize(("value", "name"), [(value, name) for value, names in NUMBERS.items() for name in names])
def test_a_number_out_of_range_is_refused_by_name(value, name):
    number = float(value) if value in ("nan", "inf", "1e308") else int(value)
    with pytest.raises(RunError, match=f"{name} = .* is out of range"):
        Run(task="digits", **{name: number})


@pytest.mark.parametrize("kind", [FewShotRun, MetaRun])
@pytest.mark.parametrize("name", ["threads", "image_size", "n_way", "n_shot", "n_query", "n_episodes"])
def test_numbers_of_few_shot_learning_are_checked_too(kind, name):
    for value in (0, -1):
        with pytest.raises(RefilledError, match=f"{name} = {value} is out of range"):
            kind(data="digits", **{name: value})


def test_the_signal_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ending.Terminated), ending.ending_by_signal():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
