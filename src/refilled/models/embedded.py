"""Small teachers that come with the package and need no download."""

from pathlib import Path

PREFIX = "refilled/"


def embedded_folder(text: str) -> Path | None:
    """Return the folder of the teacher that ``refilled/NAME`` names; None if the package has no such teacher.

    Each folder is that of a run; ``run.toml`` records how the network was trained. The weights are float16, so that
    the file is smaller than a megabyte, and are loaded as float32.
    """
    folder = Path(__file__).parent / "embedded_weights" / text.removeprefix(PREFIX)
    return folder if text in embedded_teachers() else None


def embedded_teachers() -> list[str]:
    """List the teachers that come with the package, as ``refilled/NAME``."""
    folders = (Path(__file__).parent / "embedded_weights").iterdir()
    return sorted(f"{PREFIX}{folder.name}" for folder in folders if folder.is_dir())
