"""A disk that is full: what could not be written, how to resume, and that nothing is lost."""

import errno
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from commands import call
from refilled import files

TINY = ["--student", "wrn_10_1", "--shots", "4", "--epochs", "2", "--threads", "1", "--quiet", "--no-report"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("REFILLED_CACHE", str(tmp_path / "cache"))
    return tmp_path


def fill(patch, full: str) -> None:
    """Let no file whose path contains this be written, however it is opened by Python, as on a full disk."""
    sync = os.fsync

    def refuse(descriptor):
        opened = Path(f"/proc/self/fd/{descriptor}").readlink()
        if re.search(full, str(opened)) and not opened.is_dir():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    patch.setattr(files.os, "fsync", refuse)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("full", "resumed"),
    [
        (r"/run/\.images", False),
        (r"/run/\.data\.json", False),
        (r"/run/\.run\.toml", False),
        (r"/run/\.teacher\.json", True),
        (r"/stages/\.embedding", True),
        (r"/run/\.model\.safetensors", True),
        (r"/run/\.result", True),
        (r"/run/\.DONE", True),
        (r"/cache/teacher/.*\.f32", True),
        (r"/cache/teacher/.*manifest", True),
    ],
)
def test_after_space_was_freed_a_run_ends_with_the_weights_of_an_undisturbed_one(
    here, monkeypatch, capsys, teacher, undisturbed, full, resumed
):
    run = ["distill", "digits:5-9", *TINY, "--teacher", teacher, "--views", 1, "--out", "run"]
    with monkeypatch.context() as patch:
        fill(patch, full)
        code = call(*run)
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert code == 2, said
    assert "the disk is full" in said
    assert re.search(r"[\d,]+ bytes are needed", said)
    assert "resume an unfinished run with 'refilled distill --resume FOLDER'" in said
    assert str(here / ("cache" if "cache" in full else "run")) in said or "run/" in said
    assert not list(here.rglob("*.tmp"))
    assert call(*(["distill", "--resume", "run", "--quiet", "--no-report"] if resumed else run)) == 0
    found = load_file("run/model.safetensors")
    assert found.keys() == undisturbed.keys()
    assert all(bool((found[name] == value).all()) for name, value in undisturbed.items())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [])
        patch.setenv("REFILLED_CACHE", str(folder / "cache"))
        out = folder / "run"
        assert call("distill", "digits:5-9", *TINY, "--teacher", teacher, "--views", 1, "--out", out) == 0
        shutil.rmtree(folder / "cache")
    return load_file(folder / "run" / "model.safetensors")


def test_a_full_folder_of_temporary_files_is_named(here, monkeypatch, capsys, teacher):
    class Full:
        def __init__(self, *_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    picture = Path(teacher) / "a.png"
    from PIL import Image

    Image.new("RGB", (8, 8)).save(picture)
    monkeypatch.setattr("refilled.runs.embedding.TemporaryFile", Full)
    assert call("embed", teacher, picture, "--out", "table.npz") == 2
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "table.npz cannot be written: No space left on device" in said
    assert "TMPDIR" in said
    assert not Path("table.npz").exists()
