"""The program in this process, and harms that can befall the files it reads."""

import sys
from pathlib import Path

from refilled.cli.app import main


def call(*arguments: object) -> int:
    """Run the program and return its exit code; anything else that it raises is a failure.

    It leaves its arguments in ``sys.argv``, which a test's monkeypatch puts back.
    """
    sys.argv = ["refilled", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(255, -1, -1)) * 3)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_list(path: Path) -> None:
    path.write_text("[1, 2]")
