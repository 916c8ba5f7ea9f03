"""What a user sees of the package as a whole."""

import subprocess
import sys

import refilled


def loaded_by(statement):
    script = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_losses_load_torch_and_nothing_else_heavy():
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


def test_public_names_are_what_they_say():
    assert sorted(refilled.__all__) == refilled.__all__
    for name in refilled.__all__:
        assert getattr(refilled, name).__name__ == name
    assert set(refilled._HOMES) == set(refilled.__all__)
