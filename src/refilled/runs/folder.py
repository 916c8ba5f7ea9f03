"""The folder of a run: its files, its lock, and the configuration of the run.

A run's folder contains ``run.toml`` (the configuration, fully resolved), ``data.json`` and
``images.safetensors`` (which images it uses), ``teacher.json`` (whether its teacher has anything to teach),
``log.jsonl``, ``result.json``, ``report.html``, ``README.md`` (the model card), the student (``model.safetensors``
and ``model.json``), ``stages/`` (the student after each stage but the last), ``last.ckpt`` while unfinished, and
``DONE`` when finished. A method that trains nothing leaves no student.
"""

import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from refilled.config import YOUNGER, Run
from refilled.errors import RunError
from refilled.files import damaged, read_json_object, read_record, read_tensors, write_atomic
from refilled.training.checkpoints import discard_leftovers, discard_states, hold

_FILES = (
    "run.toml",
    "data.json",
    "images.safetensors",
    "teacher.json",
    "log.jsonl",
    "result.json",
    "model.safetensors",
    "model.json",
    "trackers.json",
    "report.html",
    "README.md",
    "DONE",
)


class RunFolder:
    """A folder that holds a run, or will hold one.

    Args:
        path: The folder. It need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def begun(self) -> bool:
        """Whether a run was started in the folder."""
        return (self.path / "run.toml").exists()

    @property
    def finished(self) -> bool:
        """Whether the folder holds a finished run."""
        return (self.path / "DONE").exists()

    @property
    def has_student(self) -> bool:
        """Whether the folder holds a model."""
        return (self.path / "model.json").exists()

    @property
    def trained_nothing(self) -> bool:
        """Whether the run is finished and its method trains no network."""
        return self.finished and not self.has_student and self.run().student is None

    def stage(self, name: str) -> Path:
        """Return the file of the student's weights after a stage."""
        return self.path / "stages" / f"{name}.safetensors"

    def run(self) -> Run:
        """Read the configuration of the run.

        Raises:
            RunError: The folder holds no run, or its configuration is damaged.
        """
        text = self._read()
        try:
            return Run.from_toml(text)
        except RunError as error:
            raise RunError(damaged(self.path / "run.toml", str(error))) from error

    def recorded(self) -> dict[str, Any]:
        """Read the configuration as written. Of the missing fields, only those in :data:`YOUNGER` are filled in."""
        text = self._read()
        try:
            return {**YOUNGER, **tomllib.loads(text)}
        except (ValueError, RecursionError) as error:
            raise RunError(damaged(self.path / "run.toml", f"it is not TOML ({error})")) from error

    def _read(self) -> str:
        path = self.path / "run.toml"
        if not path.exists():
            raise RunError(f"{self.path} holds no run: there is no {path.name}")
        return read_record(path)

    def write(self, run: Run) -> None:
        """Record the configuration of the run."""
        write_atomic(self.path / "run.toml", run.to_toml().encode())

    def finish(self) -> None:
        """Mark the run as finished, and remove what only an unfinished run needs."""
        write_atomic(self.path / "DONE", b"")
        discard_states(self.path)

    def refuse_used(self) -> None:
        """Refuse a folder that holds anything.

        Raises:
            RunError: It holds a run, or something else.
        """
        if self.finished:
            raise RunError(f"{self.path} holds a finished run; choose another --out, or replace it with --overwrite")
        if self.begun:
            raise RunError(
                f"{self.path} holds an unfinished run; resume it with 'refilled distill --resume {self.path}', "
                "or replace it with --overwrite"
            )
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; choose another --out")
        if self.path.exists() and not _holds_only_leftovers(self.path):
            raise RunError(f"{self.path} is not empty and holds no run; choose another --out")

    @contextmanager
    def new(self) -> Iterator[None]:
        """Lock the folder for a new run while this process works in it.

        Raises:
            RunError: The folder holds something, or another process uses it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with hold(self.path):
            self.refuse_used()  # again, because another process may have been faster
            discard_states(self.path)
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder of a started run while this process works in it; a finished run needs no lock.

        Raises:
            RunError: The folder holds no run, or another process uses it.
        """
        if not self.begun:
            raise RunError(f"{self.path} holds no run to resume")
        with nullcontext() if self.finished else hold(self.path):
            if not self.finished:
                discard_leftovers(self.path)
            yield

    def overwrite(self) -> None:
        """Remove a run from its folder, but no other files.

        Raises:
            RunError: Another process uses the folder.
        """
        if not self.path.is_dir():
            return
        with hold(self.path):
            if self.begun:
                for name in ("stages", "tensorboard"):
                    shutil.rmtree(self.path / name, ignore_errors=True)
                for name in reversed(_FILES):  # run.toml last: what is left of an interrupted removal is still a run
                    (self.path / name).unlink(missing_ok=True)
            discard_states(self.path)


def _holds_only_leftovers(folder: Path) -> bool:
    """Return whether a folder holds no more than a start that broke off before ``run.toml`` was written."""
    names = {entry.name for entry in folder.iterdir() if not _is_leftover(entry)}
    if not names <= {"data.json", "images.safetensors"}:
        return False
    try:
        return all("train" in read_tensors(folder / name) for name in names if name == "images.safetensors") and (
            "data.json" not in names or "fingerprint" in read_json_object(folder / "data.json")
        )
    except RunError:
        return False  # files of someone else with these names


def _is_leftover(entry: Path) -> bool:
    """Return whether a file is a lock, or the remainder of an interrupted write."""
    return entry.name == ".lock" or (entry.name.startswith(".") and entry.name.endswith(".tmp"))
