"""What a user sees of the package as a whole."""

import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import refilled

ROOT = Path(__file__).parents[1]


def loaded_by(statement):
    script = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.slow
def test_the_losses_import_no_heavy_package_except_torch():
    modules = loaded_by("from refilled import TripletAlignmentLoss, LocalKDLoss, semi_hard_triplets, class_centers")
    assert "torch" in modules
    assert not modules & {
        "timm",
        "torchvision",
        "lightning_fabric",
        "sklearn",
        "datasets",
        "typer",
        "rich",
        "matplotlib",
    }


def test_the_command_line_starts_without_torch():
    assert "torch" not in loaded_by("import refilled.cli.app")


def test_a_mistaken_flag_is_refused_without_torch():
    wrong = "configure(None, {'task': 'digits', 'student': 'wrn_10_1', 'lr': -1.0})"
    run = f"import contextlib\nfrom refilled.cli.options import configure\nwith contextlib.suppress(Exception): {wrong}"
    assert "torch" not in loaded_by(run)


def test_public_names_are_what_they_say():
    assert sorted(refilled.__all__) == refilled.__all__
    for name in refilled.__all__:
        assert getattr(refilled, name).__name__ == name
    assert set(refilled._HOMES) == set(refilled.__all__)


def test_no_process_of_the_tests_reaches_another_machine():
    with pytest.raises(OSError, match="a test tried to reach"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "a test tried to reach" in child.stderr


@pytest.mark.slow
def test_the_wheel_has_every_file_and_its_losses_need_only_torch(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("refilled/")}
        archive.extractall(tmp_path / "installed")
    listed = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    missing = {name.removeprefix("src/") for name in listed.splitlines()} - packed
    assert not missing
    code = (
        "import sys, refilled\nfrom refilled.losses import TripletAlignmentLoss\n"
        "assert 'installed' in refilled.__file__, refilled.__file__\n"
        "heavy = {'timm', 'torchvision', 'lightning_fabric', 'sklearn', 'typer'} & set(sys.modules)\n"
        "assert 'torch' in sys.modules and not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, cwd=tmp_path, check=True)
