"""The training loop of a run, for every method with stages.

It depends on the method only through its stages. Its progress is a :class:`Position`; the journal receives everything
needed to resume from there as a state, so an interrupted run resumes bit-identically. Few-shot students and
meta-training have loops of their own in ``fewshot/``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from refilled.config import Recipe
from refilled.data import Task, Views, joined_batches
from refilled.data.keyed import keyed_bits
from refilled.errors import CheckpointError, NonFiniteError, RunError
from refilled.models import Backbone, refuse_non_finite
from refilled.outputs import Outputs
from refilled.stages import Prepares, Reports, Stage, Term
from refilled.training.averaging import WeightAverage
from refilled.training.checkpoints import State
from refilled.training.cuda_graphs import GraphedNetwork, can_be_graphed
from refilled.training.distributed import ALONE, World
from refilled.training.evaluation import accuracy, embed, predict_classes
from refilled.training.optimizers import create_optimizer
from refilled.training.precision import resolve_precision
from refilled.training.teacher_cache import VIEW_SEED, TeacherCache

_FALLS = {"step": (0.2, (0.25, 0.5, 0.75)), "late-step": (0.1, (0.625, 0.75, 0.875))}
"""By what factor the learning rate falls, and after what shares of a stage."""


@dataclass(frozen=True)
class Position:
    """Where training stands: the next step to take, counted from 0 in its epoch, the epoch in its stage."""

    stage: int = 0
    epoch: int = 0
    step: int = 0


class View(NamedTuple):
    """The random view of the images that is used in a step."""

    seed: int
    number: int


class Journal(Protocol):
    """Records progress and restores saved state. The default keeps nothing."""

    def restore(self) -> State | None:
        """Return the state to resume from; None if there is none."""
        return None

    def checkpoint_due(self) -> bool:
        """Whether the state should be saved after the step just taken."""
        return False

    def save(self, state: State) -> None:
        """Keep the state."""
        return

    def begin_stage(self, stage: Stage, epochs: int, steps: int, done: int) -> None:
        """A stage of ``epochs`` times ``steps`` begins, or resumes after ``done`` steps."""
        return

    def step(self, position: Position, images: int, values: Mapping[str, Tensor]) -> None:
        """A step was taken."""

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """An epoch ended; the entry is plain data."""
        return

    def end_stage(self, stage: Stage, student: Backbone) -> None:
        """A stage, not the last, ended."""
        return


def share_epochs(stages: Sequence[Stage], epochs: int) -> list[int]:
    """Divide the epochs among the stages by their shares; the parts add up to the whole."""
    total = sum(stage.share for stage in stages)
    if total <= 0:
        raise RunError(f"the shares of the stages must add up to more than 0, not {total}")
    ends = [0]
    reached = 0.0
    for stage in stages:
        reached += stage.share
        ends.append(math.floor(epochs * reached / total + 0.5))
    return [end - begin for begin, end in pairwise(ends)]


def learning_rate(recipe: Recipe, epochs: int, time: float) -> float:
    """Return the learning rate at ``time``, in epochs since its stage of ``epochs`` began."""
    warmup = min(recipe.warmup, epochs / 2)
    if time < warmup:
        return recipe.lr * (time + 1e-2) / (warmup + 1e-2)  # not quite 0, or the first step would be lost
    if recipe.schedule in _FALLS:
        factor, milestones = _FALLS[recipe.schedule]
        return recipe.lr * factor ** sum(time >= milestone * epochs for milestone in milestones)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (time - warmup) / (epochs - warmup)))


def views_of(recipe: Recipe, task: Task) -> Views:
    """Return the augmentation of a task's training images; ``auto`` is the task's own."""
    augmentation = task.augmentation if recipe.augmentation == "auto" else recipe.augmentation
    return Views(
        augmentation, recipe.mixup, recipe.cutmix, recipe.auto_augment, recipe.color_jitter, recipe.random_erasing
    )


def fit(
    student: Backbone,
    teacher: Backbone | None,
    task: Task,
    stages: Sequence[Stage],
    recipe: Recipe,
    fabric: Fabric,
    journal: Journal,
    cache: TeacherCache | None = None,
    world: World = ALONE,
    cuda_graphs: bool = True,
) -> None:
    """Train the student through the stages, from where the journal's state stands.

    Of several processes each hands over the same, a journal of its own excepted; they take every step together.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; the step is not taken.
        RunError: there are more processes than images in a batch.
        RankError: another process has ended.
    """
    _Training(student, teacher, task, recipe, fabric, journal, cache, world, cuda_graphs).run(stages)


class _Training:
    """A student under way through its stages: what all stages share, and what belongs to the present one."""

    def __init__(
        self,
        student: Backbone,
        teacher: Backbone | None,
        task: Task,
        recipe: Recipe,
        fabric: Fabric,
        journal: Journal,
        cache: TeacherCache | None,
        world: World,
        cuda_graphs: bool,
    ) -> None:
        self.student, self.teacher, self.cache, self.world = student, teacher, cache, world
        self.task, self.recipe, self.fabric, self.journal = task, recipe, fabric, journal
        self.images = task.seen
        self.labelled = len(task.train)
        self.unlabelled = len(self.images.labels) - self.labelled
        self.views = views_of(recipe, task)
        student.to(memory_format=torch.channels_last)
        self.learner = fabric.setup_module(student)
        if teacher is not None:
            teacher.to(device=fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.cuda_graphs = cuda_graphs and world.size == 1

    def run(self, stages: Sequence[Stage]) -> None:
        state = self.journal.restore()
        with _refusing_another_state():
            start = Position(**state.data["position"]) if state else Position()
        budget = share_epochs(stages, self.recipe.epochs_over(self.labelled, self.unlabelled))
        for number, (stage, epochs) in enumerate(zip(stages, budget, strict=True)):
            if number < start.stage or epochs == 0:
                continue
            self._enter(number, stage, epochs, sum(budget[:number]))
            if state is not None and number == start.stage:
                with _refusing_another_state():
                    self._restore(state)
            else:
                self._begin()
            self._train_stage()
            if self.average is not None:
                self.average.give()
            if number + 1 < len(stages):
                self.journal.end_stage(stage, self.student)

    def _enter(self, number: int, stage: Stage, epochs: int, epochs_before: int) -> None:
        self.stage, self.epochs, self.epochs_before = stage, epochs, epochs_before
        self.position = Position(number)
        self.sums: dict[str, Tensor] = {}  # of each value over the epoch so far, weighted by images
        self.losses = nn.ModuleDict({name: term.loss for name, term in stage.terms.items()}).to(self.fabric.device)
        learned = [*self.student.parameters(), *self.losses.parameters()]
        self.optimizer = create_optimizer(learned, self.recipe, self.fabric.device)
        self.average: WeightAverage | None = None
        self.graphed_student, self.graphed_teacher = self._graphed(self.student), self._graphed(self.teacher)

    def _graphed(self, network: Backbone | None) -> GraphedNetwork | None:
        device, precision = self.fabric.device, resolve_precision(self.recipe.precision, self.fabric.device)
        if network is None or not (self.cuda_graphs and can_be_graphed(network, device, precision)):
            return None
        return GraphedNetwork(network, precision)

    def _train_stage(self) -> None:
        self._check_batches()
        self._vary_random_numbers()
        steps = len(self._batches(0))
        self.journal.begin_stage(self.stage, self.epochs, steps, self.position.epoch * steps + self.position.step)
        for epoch in range(self.position.epoch, self.epochs):
            self._train_epoch(epoch, self._batches(epoch))
            self.journal.epoch(self._entry(epoch))
            self.sums = {}
            self.position = Position(self.position.stage, epoch + 1)

    def _check_batches(self) -> None:
        smallest = min(len(batch) for batch in self._batches(0))
        if smallest < self.world.size:
            raise RunError(
                f"{self.world.size} processes need as many images in every batch, but one has {smallest}; start fewer "
                "processes, or raise --batch-size"
            )

    def _vary_random_numbers(self) -> None:
        """Let dropout differ between ranks; rank 0 keeps the random numbers of a single process."""
        if not self.world.leads:
            keys = (self.position.stage, self.position.epoch, self.position.step)
            torch.manual_seed(int(keyed_bits(self.recipe.seed, "rank", self.world.rank, *keys)))

    def _batches(self, epoch: int) -> list[Tensor]:
        """Return an epoch's batches: as many whether or not its stage sees unlabelled images, labelled ones first."""
        recipe = self.recipe
        unlabelled = self.unlabelled if self._sees_unlabelled(epoch) else 0
        return joined_batches(
            self.task.train.labels,
            unlabelled,
            batch=recipe.batch_over(self.labelled, unlabelled),
            steps=recipe.steps_over(self.labelled, self.unlabelled),
            seed=recipe.seed,
            epoch=self.epochs_before + epoch,
            sampler=recipe.sampler,
            images_per_class=recipe.images_per_class,
        )

    def _sees_unlabelled(self, epoch: int) -> bool:
        return self.stage.sees_unlabelled and epoch < self.recipe.unlabelled_span * self.epochs

    def _train_epoch(self, epoch: int, batches: Sequence[Tensor]) -> None:
        terms, fabric = self.stage.terms, self.fabric
        weights = {name: term.weight(epoch) for name, term in terms.items()}
        self.student.train()
        for step in range(self.position.step, len(batches)):
            batch = batches[step]
            view = self._view(epoch, step, len(batches))
            images, labels = self._load(batch, view)  # of this process's part, and of the whole batch
            taught = self._teach(images, batch, view)
            seen = self._learn(images, len(batch))
            labelled = int((batch < self.labelled).sum())
            losses = {name: term(seen, taught, labels, labelled) for name, term in terms.items()}
            if self.views.mixed:
                share, others = self._mixed_in(batch, view)
                of_others = {
                    name: term(seen, taught, others, labelled) for name, term in terms.items() if term.reads_labels
                }
                losses |= {name: torch.lerp(loss, losses[name], share) for name, loss in of_others.items()}
            self.optimizer.zero_grad()
            fabric.backward(_weighted_sum(weights, losses))
            self.world.sum_gradients(self.student.parameters(), self.losses.parameters())
            self._check_finite(losses, taught, batch, epoch, step)
            self._set_learning_rate(epoch + step / len(batches))
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
            self._record(losses, len(batch), Position(self.position.stage, epoch, step + 1))

    def _view(self, epoch: int, step: int, steps: int) -> View:
        """Which view a step sees: that of its epoch, or one of its own where it says how images are mixed."""
        number = self.epochs_before + epoch
        if self.views.mixed:
            number = number * steps + step
        views = self.recipe.views
        return View(self.recipe.seed, number) if views is None else View(VIEW_SEED, number % views)

    def _load(self, batch: Tensor, view: View) -> tuple[Tensor, Tensor]:
        part = batch[self.world.part(len(batch))]
        images = self.views.load(self.images.pixels, part, seed=view.seed, view=view.number)
        return images.to(self.fabric.device, non_blocking=True), self._labels(batch)

    def _labels(self, indices: Tensor) -> Tensor:
        return self.images.labels[indices].to(self.fabric.device, non_blocking=True)

    def _teach(self, images: Tensor, batch: Tensor, view: View) -> Outputs | None:
        if self.teacher is None or not self.stage.needs_teacher:
            return None
        if self.cache is not None and self.stage.embedding_suffices:
            embedding = self.cache(view.number, batch).to(self.fabric.device)
            if not self.stage.reads("logits"):
                return Outputs(embedding.new_empty(len(batch), 0), embedding)
            with torch.no_grad(), self.fabric.autocast():
                return Outputs(self.teacher.classifier(embedding), embedding)
        parts = frozenset(term.teacher for term in self.stage.terms.values() if term.teacher is not None)
        if self.graphed_teacher is not None:
            return self.graphed_teacher(images, parts)
        with torch.no_grad(), self.fabric.autocast():
            taught = cast(Outputs, self.teacher(images, features="features" in parts))
        return self.world.gather_outputs(taught, len(batch), parts)

    def _learn(self, images: Tensor, count: int) -> Outputs:
        """Run the student on this process's images; returns its outputs for the whole batch of ``count``."""
        parts = frozenset(term.student for term in self.stage.terms.values())
        if self.graphed_student is not None:
            return self.graphed_student(images, parts)
        with self.world.global_batch_norm():
            seen = cast(Outputs, self.learner(images, features="features" in parts))
        return self.world.gather_outputs(seen, count, parts)

    def _mixed_in(self, batch: Tensor, view: View) -> tuple[float, Tensor]:
        """Share that the images of a mixed batch keep of themselves, and the labels of what was mixed into them."""
        pixels, place = self.images.pixels, {"seed": view.seed, "view": view.number}
        share = self.views.mixing(pixels.shape[-1], **place).share
        return share, self._labels(self.views.partners_in(pixels, batch, **place))

    def _set_learning_rate(self, time: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.rate * learning_rate(self.recipe, self.epochs, time)

    def _check_finite(
        self, losses: Mapping[str, Tensor], taught: Outputs | None, batch: Tensor, epoch: int, step: int
    ) -> None:
        """Raise before a step that would spoil the weights."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm + sum(loss.detach() for loss in losses.values())):
            return
        self._refuse_sick_teacher(taught, batch)
        values = ", ".join(f"{name} {loss.item():g}" for name, loss in losses.items())
        raise NonFiniteError(
            f"stage '{self.stage.name}', epoch {epoch + 1}, step {step + 1}: the loss or its gradient is not finite "
            f"({values}; gradient norm {norm.item():g}). The step was not taken. "
            "A lower --lr usually mends it; so can --precision 32-true or a smaller weight of the loss that grew"
        )

    def _refuse_sick_teacher(self, taught: Outputs | None, batch: Tensor) -> None:
        """Blame the teacher, and name the images, where it is its outputs that are not finite."""
        if taught is None:
            return
        sources = [self.task.train.sources[row] for row in batch.tolist()]
        hint = "" if self.recipe.precision == "32-true" else ". Its numbers may be too large for --precision bf16-mixed"
        refuse_non_finite(taught.embedding, sources, "embedding", hint)
        for what, rows in (("logits", taught.logits), *(("feature map", maps) for maps in taught.features)):
            if len(rows) == len(sources):
                refuse_non_finite(rows, sources, what, hint)

    def _record(self, losses: Mapping[str, Tensor], images: int, position: Position) -> None:
        values = {name: loss.detach() for name, loss in losses.items()}
        for term in self.stage.terms.values():
            if isinstance(term.loss, Reports):
                values.update(term.loss.statistics())
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + images * value.double()
        self.sums["images"] = self.sums.get("images", torch.zeros(())) + images
        self.position = position
        self.journal.step(position, images, values)
        if self.journal.checkpoint_due():
            self.journal.save(self._state())

    def _entry(self, epoch: int) -> dict[str, Any]:
        """Sum up an epoch for the log: only what a repeated run would give again, so no times."""
        images = self.sums["images"].item()
        means = {name: (total / images).item() for name, total in self.sums.items() if name != "images"}
        entry = {"stage": self.stage.name, "epoch": epoch + 1, "lr": self.optimizer.param_groups[0]["lr"], **means}
        classifies = any(term.student == "logits" for term in self.stage.terms.values())
        if classifies and len(self.task.val) > 0:
            averaged = nullcontext() if self.average is None else self.average.in_place()
            with averaged, self.fabric.autocast():
                found = predict_classes(self.student, self.task.val.pixels, self.fabric.device, self.world)
            entry["val_accuracy"] = accuracy(found, self.task.val.labels)
        return entry

    def _begin(self) -> None:
        if self.stage.classifier == "fresh":
            generator = torch.Generator().manual_seed(self.recipe.seed * 1000 + self.position.stage)
            self.student.reset_classifier(generator)
        self._follow_weights()
        losses = [term.loss for term in self.stage.terms.values()]
        curious = [loss for loss in losses if isinstance(loss, Prepares) and loss.needs_training_set]
        if curious and self.teacher is not None:
            with self.fabric.autocast():
                parts = [self.task.train, *([self.task.unlabelled] if self.task.unlabelled is not None else [])]
                found = [embed(self.teacher, part.pixels, self.fabric.device, self.world) for part in parts]
            for part, embedding in zip(parts, found, strict=True):
                refuse_non_finite(embedding, part.sources)
            embedding, labels = torch.cat(found).to(self.fabric.device), self.images.labels.to(self.fabric.device)
            for loss in curious:
                shown = len(labels) if _sees_unlabelled(loss) else self.labelled
                loss.prepare(embedding[:shown], labels[:shown])

    def _follow_weights(self) -> None:
        if self.recipe.ema > 0:
            self.average = WeightAverage(self.student, self.recipe.ema)

    def _state(self) -> State:
        tensors = {f"student/{name}": value for name, value in self.student.state_dict().items()}
        tensors |= {f"losses/{name}": value for name, value in self.losses.state_dict().items()}
        tensors |= {f"sums/{name}": value for name, value in self.sums.items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": v for name, v in entries.items() if v is not None}
        tensors["random"] = torch.get_rng_state()
        if self.fabric.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state()
        if self.average is not None:
            tensors |= {f"average/{name}": value for name, value in self.average.values.items()}
            tensors["updates"] = torch.tensor(self.average.updates)
        lr = self.optimizer.param_groups[0]["lr"]
        # The names of the sums are saved for their order, which a file of tensors does not keep and the log needs.
        return State(tensors, {"position": vars(self.position), "lr": lr, "sums": list(self.sums)})

    def _restore(self, state: State) -> None:
        self.position = Position(**state.data["position"])
        self.student.load_state_dict(dict(_under("student/", state.tensors)))
        self.losses.load_state_dict(dict(_under("losses/", state.tensors)))
        self.losses.to(self.fabric.device)  # what only the state knew the size of was made on the processor
        self.sums = {name: state.tensors[f"sums/{name}"] for name in state.data["sums"]}
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for name, value in _under("optimizer/", state.tensors):
            index, entry = name.split("/")
            parameter = parameters[int(index)]
            if entry == "step":  # AdamW counts its steps in a tensor
                self.optimizer.state[parameter][entry] = value.to(self.fabric.device)
                continue
            # In the memory layout of its parameter: the fused step walks both in the order of memory.
            self.optimizer.state[parameter][entry] = torch.empty_like(parameter).copy_(value)
        self._follow_weights()
        if self.average is not None:
            self.average.restore(dict(_under("average/", state.tensors)), int(state.tensors["updates"]))
        for group in self.optimizer.param_groups:
            group["lr"] = state.data["lr"]
        torch.set_rng_state(state.tensors["random"])
        if "random_cuda" in state.tensors and self.fabric.device.type == "cuda":
            torch.cuda.set_rng_state(state.tensors["random_cuda"])


@contextmanager
def _refusing_another_state() -> Iterator[None]:
    """Explain a state that is whole, but of another network or optimiser."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"the saved state belongs to another run: its content does not fit this one ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Restore last.ckpt of this run, or begin anew with --overwrite"
        ) from error


def _sees_unlabelled(loss: nn.Module) -> bool:
    return Term(loss).sees_unlabelled


def _weighted_sum(weights: Mapping[str, float], losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), value) for name, value in tensors.items() if name.startswith(prefix))
