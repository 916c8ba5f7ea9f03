"""Damaged and foreign files under every command that reads them: a sentence with the file's name, and no traceback."""

import ctypes
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from commands import a_list, call, directory, empty, noise
from refilled.training.checkpoints import save_state

TINY = ["--student", "wrn_10_1", "--shots", "4", "--epochs", "1", "--threads", "1", "--quiet", "--no-report"]
TASKS = [
    *("--n-shot", "1", "--n-query", "2", "--n-way", "2", "--n-episodes", "2", "--image-size", "16"),
    *("--threads", "1", "--quiet"),
]
META = ["--method", "feat", "--validate-every", "1", "--n-validation", "1"]
TUNE = [
    *("tune", "digits:0-4", "--student", "wrn_10_1", "--shots", "4", "--epochs", "1", "--threads", "1"),
    *("--method", "vanilla", "--search", "lr=0.1,0.2", "--trials", "1", "--out", "tuned"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, photos):
    """A folder with one of each thing that commands read, all made by commands."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(photos, root / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [])
        patch.setenv("REFILLED_CACHE", str(root / "cache"))
        patch.chdir(root)
        for arguments in (
            ["train", "digits:0-4", *TINY, "--out", "run"],
            ["distill", "digits:5-9", *TINY, "--teacher", "run", "--views", 1, "--out", "taught"],
            ["fewshot", "--data", "./photos", *TASKS, "--teacher", "run", "--out", "tested"],
            ["meta-train", "--data", "./photos", *TASKS, *META, "--out", "meta"],
            TUNE,
            ["report", "run"],
        ):
            assert call(*arguments) == 0, arguments
    shard = next(root.glob("cache/teacher/*"))
    shard.rename(shard.with_name("shards"))
    (root / "c.toml").write_text('title = "t"\n[run]\ntask = "digits:0-4"\n[rows]\nvanilla = { method = "vanilla" }\n')
    return root


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    """Go to a copy of these things that may be damaged."""
    for entry in whole.iterdir():
        if entry.name == "photos":
            (tmp_path / "photos").mkdir()
            for part in entry.iterdir():
                (tmp_path / "photos" / part.name).symlink_to(part)
        else:
            (shutil.copytree if entry.is_dir() else shutil.copy)(entry, tmp_path / entry.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [])
    return tmp_path


def torn(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def deep(path):
    path.write_text("[" * 100_000)


def other_tensors(path):
    path.write_bytes(save({"a": torch.zeros(1)}))


def with_values(change):
    """Return a harm that keeps the keys of a JSON object and changes the values."""

    def harm(path):
        path.write_text(json.dumps({key: change(value) for key, value in json.loads(path.read_text()).items()}))

    return harm


def unreadable(path):
    path.chmod(0)


def long_number(path):
    path.write_text("9" * 5000 if path.suffix == ".json" else f"epochs = {'9' * 5000}")


HARMS = {
    "empty": empty,
    "noise": noise,
    "torn": torn,
    "directory": directory,
    "list": a_list,
    "deep": deep,
    "other tensors": other_tensors,
    "nulls": with_values(lambda value: None),
    "hollow": with_values(lambda value: type(value)() if isinstance(value, dict | list) else value),
    "unreadable": unreadable,
    "long number": long_number,  # that Python refuses to read
}
JSON = ["empty", "noise", "torn", "directory", "list", "deep", "nulls", "hollow", "unreadable", "long number"]
LINES = ["noise", "directory", "list", "deep", "unreadable", "long number"]
BINARY = ["empty", "torn", "directory", "other tensors", "unreadable"]
TEXT = ["empty", "noise", "torn", "directory", "unreadable"]
TOML = [*TEXT, "long number"]
FEWSHOT = ["fewshot", "--data", "./photos", *TASKS, "--teacher"]
META_TRAIN = ["meta-train", "--data", "./photos", *TASKS, *META, "--out"]
EMBED = ["embed", "run", "photos", "--out", "table.csv"]
REPORT = ["report", "taught"]
AGAIN = ["distill", "--resume", "taught", "--quiet", "--no-report"]
STUDENT = ["distill", "digits:0-4", *TINY[2:], "--method", "vanilla", "--out", "new", "--student"]
TEACHER = ["distill", "digits:5-9", *TINY, "--out", "new", "--teacher"]
READ = [
    (EMBED, "run/model.json", JSON),
    (EMBED, "run/model.safetensors", BINARY),
    (["export", "run", "--format", "safetensors"], "run/model.json", JSON),
    (REPORT, "taught/log.jsonl", LINES),
    (REPORT, "taught/result.json", JSON),
    (["report", "run", "--against", "taught"], "taught/result.json", JSON),
    (["push", "run", "user/name"], "run/result.json", JSON),
    (["push", "run", "user/name"], "run/model.json", JSON),
    (["push", "run", "user/name"], "run/model.safetensors", BINARY),
    (["push", "run", "user/name"], "run/README.md", ["empty", "noise", "directory", "unreadable"]),
    (["serve", "taught", "--port", "0"], "taught/model.json", ["noise", "list"]),
    (["serve", "taught", "--port", "0"], "taught/data.json", ["noise", "list", "nulls", "deep", "unreadable"]),
    (["evaluate", "run"], "run/data.json", ["nulls", "deep"]),
    (["compare", "c.toml", "--out", "new"], "c.toml", TOML),
    (TUNE, "tuned/tuning.toml", TOML),
    (TUNE, "tuned/journal.log", ["noise", "directory", "list", "unreadable"]),
    (TUNE, "tuned/best/0/result.json", ["noise", "hollow"]),
    ([*FEWSHOT, "run", "--out", "tested"], "tested/run.toml", TOML),
    ([*FEWSHOT, "run", "--out", "tested"], "tested/result.json", JSON),
    (
        [*FEWSHOT, "meta", "--method", "feat", "--out", "new"],
        "meta/head.safetensors",
        ["torn", "directory", "unreadable"],
    ),
    ([*META_TRAIN, "meta"], "meta/result.json", ["noise", "list", "nulls", "deep", "unreadable"]),
    ([*META_TRAIN, "new", "--start", "run"], "run/model.safetensors", BINARY),
    (["teachers", "digits:5-9", "--candidates", "run", "--quiet"], "run/model.json", ["noise", "nulls", "hollow"]),
    ([*TEACHER, "run"], "run/model.json", JSON),
    ([*STUDENT, "run"], "run/model.safetensors", BINARY),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "file", "harm"),
    [
        pytest.param(arguments, file, harm, id=f"{arguments[0]} {file} {harm}")
        for arguments, file, harms in READ
        for harm in harms
    ],
)
def test_a_damaged_file_is_named_by_each_command_that_reads_it(here, capsys, arguments, file, harm):
    HARMS[harm](here / file)
    with without_the_rights_of_root():
        code = call(*arguments)
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert code == 2, said
    assert file in said or (Path(file).name in said and Path(file).parent.name in said)


class without_the_rights_of_root:
    """Let the rights of files hold for this thread even if the tests run as root, as they do in containers."""

    def __enter__(self) -> None:
        if os.geteuid() == 0:
            self._set(self._get() & ~0b110)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH

    def __exit__(self, *error: object) -> None:
        if os.geteuid() == 0:
            self._set(self._get() | 0b110)

    def _get(self) -> int:
        self._header, self._data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        ctypes.CDLL(None).capget(self._header, self._data)
        return self._data[0]

    def _set(self, effective: int) -> None:
        self._data[0] = effective
        ctypes.CDLL(None).capset(self._header, self._data)


@pytest.mark.parametrize("harm", ["noise", "torn", "directory", "list", "nulls", "deep"])
def test_a_damaged_cache_is_reported_and_built_again(here, capsys, harm):
    HARMS[harm](here / "cache" / "teacher" / "shards" / "manifest.json")
    for command in ("info", "verify"):
        assert call("cache", command) == 0
        assert "shards holds no readable teacher cache: manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["noise", "torn", "directory"])
def test_a_damaged_shard_of_a_cache_is_found(here, capsys, harm):
    shard = next((here / "cache" / "teacher" / "shards").glob("view-*"))
    HARMS[harm](shard)
    assert call("cache", "verify") == 1
    assert shard.name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tensors", "data"),
    [
        ({}, {}),
        ({}, {"position": 3}),
        ({}, {"position": {"stage": 0, "epoch": 0, "step": 0}, "sums": {}, "best": 3}),
        (
            {"learner/a": torch.zeros(1)},
            {"position": {"stage": 0, "epoch": 0, "step": 0}, "sums": {}, "best": [0, [0]]},
        ),
        ({}, {"seconds": "long"}),
        ({}, {"log_bytes": "many"}),
    ],
)
def test_a_state_of_another_meta_training_is_refused(here, capsys, tensors, data):
    (here / "meta" / "DONE").unlink()
    save_state(here / "meta", tensors, data)
    assert call(*META_TRAIN, "meta") == 2
    assert "the saved state belongs to another run" in capsys.readouterr().err


@pytest.mark.parametrize("harm", BINARY)
def test_the_student_after_a_stage_is_named_if_it_is_damaged(here, capsys, harm):
    from refilled.errors import RefilledError
    from refilled.runs.inference import network_of

    HARMS[harm](here / "taught" / "stages" / "embedding.safetensors")
    with pytest.raises(RefilledError, match=r"embedding\.safetensors"), without_the_rights_of_root():
        network_of(here / "taught", "embedding")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "digits:0-4", *TINY, "--out", "c.toml"],
        ["distill", "digits:5-9", *TINY, "--teacher", "run", "--out", "c.toml/below"],
        ["compare", "digits:0-4", "--methods", "vanilla", "--student", "wrn_10_1", "--out", "c.toml"],
        [*TUNE[:-1], "c.toml"],
        ["export", "run", "--format", "safetensors", "--out", "c.toml"],
        ["embed", "run", "photos", "--out", "c.toml/table.csv"],
        ["export", "run", "--format", "safetensors", "--out", "x" * 300],
        ["embed", "run", "photos", "--out", "x" * 300 + ".csv"],
        ["evaluate", "x" * 300],
        ["evaluate", "run", "./" + "x" * 300],
        ["predict", "run", "x" * 300],
        ["predict", "x" * 300 + ".onnx", "photos"],
        ["report", "x" * 300],
        ["distill", "--resume", "x" * 300],
        ["train", "./" + "x" * 300],
        ["train", "x" * 300 + ".parquet"],
        ["train", "wds:" + "x" * 300],
        ["compare", "x" * 300 + ".toml"],
        [*TEACHER, "x" * 300],
        [*TEACHER, "wrn_10_1:" + "x" * 300, "--teacher-mean", "0", "0", "0", "--teacher-std", "1", "1", "1"],
        [*TEACHER, "x" * 300 + ".py:make"],
        [*STUDENT, "x" * 300],
        ["distill", "digits:0-4", *TINY, "--method", "x" * 300 + ".py", "--out", "new"],
        ["meta-train", "--data", "./photos", *TASKS, "--start", "x" * 300, "--out", "new"],
        ["fewshot", "--data", "./photos@split=" + "x" * 300, *TASKS, "--out", "new"],
        ["reproduce", "table2", "--only", "Student", "--seeds", "1", "--out", "c.toml"],
        ["reproduce", "table2", "--dry-run", "--out", "x" * 300],
        ["push", "c.toml", "user/name"],
    ],
    ids=lambda arguments: re.sub(r"x{9,}", "long", " ".join([*arguments[:2], *arguments[-2:]])),
)
def test_files_instead_of_folders_and_long_names_are_mistakes(here, capsys, arguments):
    before = (here / "c.toml").read_text()
    code = call(*arguments)
    said = capsys.readouterr().err
    assert (code, (here / "c.toml").read_text()) in ((2, before), (1, before)), said
    assert "error" in said or "skipped" in said


def test_an_unfinished_run_is_not_pushed(here, capsys):
    (here / "run" / "DONE").unlink()
    assert call("push", "run", "user/name") == 2
    assert "run holds no finished run" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["file", "below a file", "unreadable"])
def test_doctor_names_a_cache_folder_that_cannot_be_used(tmp_path, monkeypatch, capsys, harm):
    folder = tmp_path / "cache" if harm != "below a file" else tmp_path / "cache" / "below"
    if harm == "unreadable":
        folder.mkdir(mode=0)
    else:
        (tmp_path / "cache").write_text("mine")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr("refilled.runs.choice._SECONDS", 0.0)
    monkeypatch.setattr("refilled.network.fault_of", lambda address: None)
    monkeypatch.setenv("REFILLED_CACHE", str(folder))
    monkeypatch.setenv("REFILLED_DATA", str(tmp_path / "cache"))
    with without_the_rights_of_root():
        code = call("doctor")
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert code == 1, said
    assert f"the cache folder {folder} cannot be written" in said
    assert "set REFILLED_CACHE to another folder" in said
