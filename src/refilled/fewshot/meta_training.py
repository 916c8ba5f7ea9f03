"""Meta-training of a backbone, and of a method's other weights, on many tasks of the seen classes.

The run's folder is a teacher's folder: ``model.safetensors`` and ``model.json`` hold the weights that did best on tasks
of the validation classes. ``head.safetensors`` holds the method's other weights. ``run.toml``, ``log.jsonl``,
``result.json``, ``last.ckpt`` and ``DONE`` are as in any run. An interrupted run resumes when it is started again, with
a bit-identical result.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor

from refilled.config import MetaRun
from refilled.data import Task, augment, channel_statistics, load_pool, sample_episodes
from refilled.data.keyed import keyed_integers
from refilled.errors import NonFiniteError, RunError
from refilled.fewshot.evaluation import HEAD, mean_and_interval, refuse_other
from refilled.fewshot.meta_learner import MetaLearner, MetaTask
from refilled.fewshot.methods import load_meta_learner
from refilled.fewshot.students import with_classifier
from refilled.files import read_fields, write_atomic
from refilled.models import Backbone, create_model, load_model, save_model
from refilled.runs.determinism import use_machine
from refilled.runs.environment import device_name, find_device, versions
from refilled.stages import Stage
from refilled.training.checkpoints import State, discard_states, hold
from refilled.training.journal import RunJournal
from refilled.training.loop import Position
from refilled.training.progress import Display

_STAGE = Stage("meta-training", {})
_HALVINGS = 10  # of the learning rate, as in FEAT's code


@dataclass(frozen=True)
class MetaResult:
    """The result of a finished meta-training, as in ``result.json``."""

    val_accuracy: float
    """Best accuracy on tasks of the validation classes, in percent."""
    interval: float | None
    """Half the width of the 95 % interval over tasks."""
    best_epoch: int
    """Epoch of the best accuracy, counted from 1."""
    seconds: float
    parameters: int
    data: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a finished run's result."""
        return read_fields(cls, folder / "result.json")


def meta_train(
    run: MetaRun, folder: Path, *, display: Display | None = None, seconds_between_saves: float = 60.0
) -> MetaResult:
    """Run meta-training, or the rest of it, and write everything to the folder.

    Raises:
        RunError: The folder holds something else, or another process holds its lock.
        NonFiniteError: The loss is NaN or infinite. The step is not taken.
        RefilledError: The run cannot work as configured.
    """
    run = resolve(run)
    refuse_other(folder, run.to_toml())
    if (folder / "DONE").exists():
        return MetaResult.load(folder)
    use_machine(run.threads, run.device)
    training = _MetaTraining(run)
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        write_atomic(folder / "run.toml", run.to_toml().encode())
        journal = RunJournal(folder, display or Display(), seconds_between_saves)
        try:
            with journal.catching_signals():
                training.carry_out(journal)
        finally:
            journal.display.close()
        result = training.finish(folder, journal.seconds)
        write_atomic(folder / "result.json", (json.dumps(asdict(result), indent=2) + "\n").encode())
        write_atomic(folder / "DONE", b"")
        discard_states(folder)
    return result


def resolve(run: MetaRun) -> MetaRun:
    """Fill in what the run leaves to the machine and to the method's defaults."""
    return replace(
        run,
        device=find_device(run.device).type,
        settings=load_meta_learner(run.method).settle(run.settings),
        threads=run.threads or torch.get_num_threads(),
    )


class _MetaTraining:
    """A learner in training. An epoch lasts from one validation to the next."""

    def __init__(self, run: MetaRun) -> None:
        self.run, self.device = run, torch.device(run.device)
        root = Path(run.data_root) if run.data_root else None
        bad = run.allow_bad
        self.seen = load_pool(run.data, "seen", data_root=root, image_size=run.image_size, allow_bad=bad)
        self.val = load_pool(run.data, "val", data_root=root, image_size=self.seen.image_size, allow_bad=bad)
        torch.manual_seed(run.seed)
        make = load_meta_learner(run.method).function
        learner = make(_backbone(run, self.seen), **run.settings)
        assert isinstance(learner, MetaLearner)
        # Convolutions take two thirds of the time in this layout.
        self.learner = learner.to(self.device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(learner.backbone.parameters()), "factor": 1},
                {"params": [p for n, p in learner.named_parameters() if not n.startswith("backbone.")], "factor": 10},
            ]
        )
        self.steps = max(1, run.validate_every // run.tasks)
        self.epochs = max(1, -(-run.n_episodes // (self.steps * run.tasks)))
        self.position = Position()
        self.sums = {"loss": 0.0, "accuracy": 0.0}  # over the epoch so far
        self.best: dict[str, Tensor] = {}
        self.best_epoch, self.best_accuracies = 0, [-1.0]

    def carry_out(self, journal: RunJournal) -> None:
        if state := journal.restore():
            self._restore(state)
        journal.begin_stage(_STAGE, self.epochs, self.steps, self.position.epoch * self.steps + self.position.step)
        for epoch in range(self.position.epoch, self.epochs):
            self.learner.train()
            for step in range(self.position.step, self.steps):
                self._step(epoch * self.steps + step, journal, Position(0, epoch, step + 1))
            journal.epoch(self._validate(epoch))
            self.sums = dict.fromkeys(self.sums, 0.0)
            self.position = Position(0, epoch + 1)

    def finish(self, folder: Path, seconds: float) -> MetaResult:
        """Write the best weights to the folder."""
        self.learner.load_state_dict(self.best)
        save_model(self.learner.backbone, folder)
        if head := self.learner.head():
            write_atomic(folder / HEAD, save({name: value.contiguous().cpu() for name, value in head.items()}))
        accuracy, interval = mean_and_interval(self.best_accuracies)
        return MetaResult(
            val_accuracy=accuracy,
            interval=interval,
            best_epoch=self.best_epoch,
            seconds=seconds,
            parameters=sum(p.numel() for p in self.learner.parameters()),
            data={
                "seen": {"pool": self.seen.name, "fingerprint": self.seen.fingerprint},
                "val": {"pool": self.val.name, "fingerprint": self.val.fingerprint},
                "image_size": self.seen.image_size,
            },
            versions=versions(),
            hardware={"device": device_name(self.device), "threads": self.run.threads},
        )

    def _step(self, number: int, journal: RunJournal, position: Position) -> None:
        first = number * self.run.tasks
        task = self._task(self.seen, range(first, first + self.run.tasks), seed=self.run.seed, view=number)
        # Seeded by the step number, so that dropout does not depend on earlier random draws.
        torch.manual_seed(int(keyed_integers(2**31, self.run.seed, "dropout", number)))
        loss, scores = self.learner.loss(task)
        self.optimizer.zero_grad()
        loss.backward()
        if not loss.isfinite():
            raise NonFiniteError(f"meta-training, step {number + 1}: the loss is not finite; a lower --lr may help")
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * self._learning_rate(number)
        self.optimizer.step()
        self.position = position
        values = {"loss": loss.detach(), "accuracy": _accuracies(scores, task).mean()}
        for name, value in values.items():
            self.sums[name] += value.item()
        journal.step(position, task.support.shape[1] + task.query.shape[1], values)
        if journal.checkpoint_due():
            journal.save(self._state())

    def _validate(self, epoch: int) -> dict[str, Any]:
        """Validate, keep the weights if they are the best so far, and summarise the epoch."""
        self.learner.eval()
        accuracies: list[float] = []
        with torch.no_grad():
            for number in range(self.run.n_validation):
                task = self._task(self.val, range(number, number + 1), seed=0, view=None)
                accuracies += _accuracies(self.learner.scores(task), task).tolist()
        accuracy, best = (mean_and_interval(values)[0] for values in (accuracies, self.best_accuracies))
        if accuracy > best:
            self.best = {name: value.clone() for name, value in self.learner.state_dict().items()}
            self.best_epoch, self.best_accuracies = epoch + 1, accuracies
        means = {name: total / self.steps for name, total in self.sums.items()}
        lr = self._learning_rate((epoch + 1) * self.steps - 1)
        return {"stage": _STAGE.name, "epoch": epoch + 1, "lr": lr, **means, "val_accuracy": accuracy}

    def _learning_rate(self, number: int) -> float:
        """Return the backbone's learning rate at a step."""
        return self.run.lr * 0.5 ** int(_HALVINGS * number / (self.epochs * self.steps))

    def _task(self, pool: Task, numbers: range, *, seed: int, view: int | None) -> MetaTask:
        run = self.run
        drawn = sample_episodes(
            pool.train.labels, numbers, n_way=run.n_way, n_shot=run.n_shot, n_query=run.n_query, seed=seed
        )
        rows = torch.cat([drawn.support, drawn.query], 1)
        images = pool.train.pixels[rows.flatten()]
        if view is not None:
            images = augment(images, rows.flatten(), seed=seed, view=view, kind=pool.augmentation)
        images = images.unflatten(0, rows.shape).to(self.device)
        support, query = images.split([drawn.support.shape[1], drawn.query.shape[1]], 1)
        return MetaTask(support, drawn.labels.to(self.device), query, drawn.query_labels.to(self.device))

    def _state(self) -> State:
        tensors = {f"learner/{name}": value for name, value in self.learner.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in entries.items()}
        plain = {"position": vars(self.position), "sums": self.sums}
        return State(tensors, {**plain, "best": [self.best_epoch, self.best_accuracies]})

    def _restore(self, state: State) -> None:
        self.position = Position(**state.data["position"])
        self.sums = state.data["sums"]
        self.best_epoch, self.best_accuracies = state.data["best"]
        parts: dict[str, dict[str, Tensor]] = {"learner": {}, "best": {}, "optimizer": {}}
        for name, value in state.tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = value
        self.learner.load_state_dict(parts["learner"])
        self.best = parts["best"]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            index, entry = name.split("/")
            moments.setdefault(int(index), {})[entry] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


def _backbone(run: MetaRun, seen: Task) -> Backbone:
    """Make the backbone. Its classifier has one output per class of a task."""
    if run.start is not None:
        if not Path(run.start).is_dir():
            raise RunError(f"there is no folder {run.start} with a model to start from")
        return with_classifier(load_model(Path(run.start)), run.n_way)
    mean, std = channel_statistics(seen.train.pixels)
    return create_model(run.model, run.n_way, image_size=seen.image_size, mean=mean, std=std)


def _accuracies(scores: Tensor, task: MetaTask) -> Tensor:
    return 100 * (scores.detach().argmax(2) == task.query_labels).double().mean(1)
