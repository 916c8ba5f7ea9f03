"""Trackers of experiments: TensorBoard, MLflow, Weights & Biases, Trackio.

A tracker follows ``log.jsonl``. What it has sent is recorded in the run's folder, so that a resumed run continues.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from refilled.errors import RunError, unknown
from refilled.files import read_record, write_atomic
from refilled.runs.result import Result
from refilled.training.progress import Display

_MODULES = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow", "wandb": "wandb", "trackio": "trackio"}
STATE = "trackers.json"
"""The file in a run's folder that records what each tracker has sent."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed.

    Raises:
        RunError: There is such a one; its install line is in the message.
    """
    for name in names:
        if name not in _MODULES:
            raise RunError(unknown("tracker", name, _MODULES))
        try:
            import_module(_MODULES[name])
        except ImportError:
            raise RunError(f"--tracker {name} needs a further package: pip install 'refilled[{name}]'") from None


class Tracked(Display):
    """A display that also sends each epoch of a run to trackers. One that fails is left out with a warning.

    Args:
        shown: Where progress is shown.
        folder: The run's folder.
        names: Trackers.
    """

    def __init__(self, shown: Display, folder: Path, names: Sequence[str]) -> None:
        check_trackers(names)
        self._shown, self._folder, self._names = shown, folder, list(dict.fromkeys(names))
        self._open: dict[str, Any] = {}

    def begin_stage(self, name: str, epochs: int, steps: int, done: int) -> None:
        """Show it."""
        self._shown.begin_stage(name, epochs, steps, done)

    def step(self, epoch: int, images: int, values: Mapping[str, Tensor]) -> None:
        """Show it."""
        self._shown.step(epoch, images, values)

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """Send the lines of the log that were not sent yet; the entry is the last of them."""
        self._shown.epoch(entry)
        self._send(None)

    def message(self, text: str) -> None:
        """Show it."""
        self._shown.message(text)

    def close(self) -> None:
        """End what is open; :meth:`finish` opens it again."""
        self._shown.close()
        for name in list(self._open):
            self._end(name)

    def finish(self, result: Result) -> None:
        """Send the numbers of the result, unless they were sent."""
        self._send(result)
        self.close()

    def _send(self, result: Result | None) -> None:
        log = self._folder / "log.jsonl"
        lines = read_record(log).splitlines() if log.exists() else []
        for name in list(self._names):
            try:
                self._send_to(name, lines, result)
            except Exception as error:  # of many kinds; a tracker must not end the training
                again = f"refilled distill --resume {self._folder} --tracker {name}"
                self._shown.message(f"warning: {name} failed ({error}); send the rest later with: {again}")
                self._names.remove(name)
                self._open.pop(name, None)

    def _send_to(self, name: str, lines: Sequence[str], result: Result | None) -> None:
        path = self._folder / STATE
        states = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        state = states.setdefault(name, {"id": uuid4().hex[:8], "sent": 0, "finished": False})
        if state["sent"] >= len(lines) and (result is None or state["finished"]):
            return
        if name not in self._open:
            config = tomllib.loads((self._folder / "run.toml").read_text(encoding="utf-8"))
            self._open[name] = _SERVICES[name](self._folder, state, config)
            write_atomic(path, json.dumps(states).encode())
        service = self._open[name]
        for number in range(state["sent"], len(lines)):
            service.log(_numbers(json.loads(lines[number])), number + 1)
            state["sent"] = number + 1
            write_atomic(path, json.dumps(states).encode())
        if result is not None and not state["finished"]:
            numbers = {"accuracy": result.accuracy, "ncm_accuracy": result.ncm_accuracy, "seconds": result.seconds}
            service.log({f"result/{key}": value for key, value in numbers.items()}, max(len(lines), 1))
            state["finished"] = True
            write_atomic(path, json.dumps(states).encode())

    def _end(self, name: str) -> None:
        try:
            self._open.pop(name).end()
        except Exception as error:  # as above
            self._shown.message(f"warning: {name} failed at its end ({error})")


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return an epoch's numbers, under the name of its stage where they are losses."""
    shared = ("lr", "val_accuracy")
    return {
        (name if name in shared else f"{entry['stage']}/{name}"): float(value)
        for name, value in entry.items()
        if name not in ("stage", "epoch")
    }


class _TensorBoard:
    def __init__(self, folder: Path, state: dict[str, Any], config: dict[str, Any]) -> None:
        writer = import_module(_MODULES["tensorboard"]).SummaryWriter
        self._writer = writer(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self) -> None:
        self._writer.close()


class _MLflow:
    def __init__(self, folder: Path, state: dict[str, Any], config: dict[str, Any]) -> None:
        self._mlflow = mlflow = import_module("mlflow")
        mlflow.set_experiment("refilled")
        if "run" in state:
            mlflow.start_run(run_id=state["run"])
        else:
            state["run"] = mlflow.start_run(run_name=folder.name).info.run_id
            mlflow.log_params(config)

    def log(self, values: Mapping[str, float], step: int) -> None:
        named = {name.replace("@", " "): value for name, value in values.items()}  # MLflow refuses an @
        self._mlflow.log_metrics(named, step=step)

    def end(self) -> None:
        self._mlflow.end_run()


class _Service:
    """Weights & Biases, or Trackio, which has the same interface."""

    def __init__(self, module: Any, **named: Any) -> None:
        self._module = module
        module.init(project="refilled", resume="allow", **named)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def end(self) -> None:
        self._module.finish()


def _wandb(folder: Path, state: dict[str, Any], config: dict[str, Any]) -> _Service:
    return _Service(import_module("wandb"), id=state["id"], name=folder.name, config=config, dir=str(folder))


def _trackio(folder: Path, state: dict[str, Any], config: dict[str, Any]) -> _Service:
    # Trackio finds a run again by its name.
    return _Service(import_module("trackio"), name=f"{folder.name}-{state['id']}", config=config)


_SERVICES: dict[str, Any] = {"tensorboard": _TensorBoard, "mlflow": _MLflow, "wandb": _wandb, "trackio": _trackio}
