"""The training loop of a run, for every method with stages.

It depends on the method only through its stages. Its progress is a :class:`Position`; the journal receives everything
needed to resume from there as a state, so an interrupted run resumes bit-identically. Few-shot students and
meta-training have loops of their own in ``fewshot/``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from refilled.data import Task, Views, joined_batches
from refilled.data.keyed import keyed_bits
from refilled.errors import NonFiniteError, RunError
from refilled.models import Backbone
from refilled.outputs import Outputs
from refilled.recipe import Recipe
from refilled.stages import Reports, Stage, numbered, read_by, weighted_sum
from refilled.training.averaging import WeightAverage
from refilled.training.checkpoints import State, refusing_another_state
from refilled.training.cuda_graphs import GraphedNetwork, can_be_graphed
from refilled.training.distributed import ALONE, World
from refilled.training.evaluation import accuracy, predict_classes
from refilled.training.heads import begins_with_heads, train_heads
from refilled.training.optimizers import create_optimizer, optimizer_tensors, restore_optimizer
from refilled.training.precision import resolve_precision
from refilled.training.schedule import learning_rate, share_epochs
from refilled.training.teacher_cache import VIEW_SEED, TeacherCache
from refilled.training.teaching import Teaching, embed_seen


@dataclass(frozen=True)
class Position:
    """The position of training: the next step, counted from 0 in its epoch, and the epoch, counted in its stage."""

    stage: int = 0
    epoch: int = 0
    step: int = 0


class View(NamedTuple):
    """The random view of the images in a step."""

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
        """Save the state."""
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
        """A stage ended that is not the last."""
        return


def views_of(recipe: Recipe, task: Task) -> Views:
    """Return the augmentation of a task's training images; ``auto`` is the task's own."""
    augmentation = task.augmentation if recipe.augmentation == "auto" else recipe.augmentation
    return Views(
        augmentation, recipe.mixup, recipe.cutmix, recipe.auto_augment, recipe.color_jitter, recipe.random_erasing
    )


def fit(
    student: Backbone,
    teacher: Backbone | Sequence[Backbone] | None,
    task: Task,
    stages: Sequence[Stage],
    recipe: Recipe,
    fabric: Fabric,
    journal: Journal,
    cache: TeacherCache | Sequence[TeacherCache | None] | None = None,
    world: World = ALONE,
    cuda_graphs: bool = True,
) -> None:
    """Train the student through the stages, starting from the journal's state.

    Several processes pass the same arguments, except for a journal of their own, and take every step together. With
    several teachers, each may have a cache.

    Raises:
        NonFiniteError: A loss or gradient is NaN or infinite; the step is not taken.
        RunError: There are more processes than images in a batch.
        RankError: Another process has ended.
    """
    teachers = [] if teacher is None else [teacher] if isinstance(teacher, Backbone) else list(teacher)
    caches = list(cache) if isinstance(cache, Sequence) else [cache] * len(teachers)
    teaching = [
        Teaching(number, each, own, fabric, world)
        for number, (each, own) in enumerate(zip(teachers, caches, strict=True))
    ]
    _Training(student, teaching, task, recipe, fabric, journal, world, cuda_graphs).run(stages)


class _Training:
    """The training of a student: the state that all stages share, and that of the present stage."""

    def __init__(
        self,
        student: Backbone,
        teaching: Sequence[Teaching],
        task: Task,
        recipe: Recipe,
        fabric: Fabric,
        journal: Journal,
        world: World,
        cuda_graphs: bool,
    ) -> None:
        self.student, self.teaching, self.world = student, teaching, world
        self.task, self.recipe, self.fabric, self.journal = task, recipe, fabric, journal
        self.images = task.seen
        self.labelled = len(task.train)
        self.unlabelled = len(self.images.labels) - self.labelled
        self.views = views_of(recipe, task)
        student.to(memory_format=torch.channels_last)
        self.learner = fabric.setup_module(student)
        self.cuda_graphs = cuda_graphs and world.size == 1

    def run(self, stages: Sequence[Stage]) -> None:
        state = self.journal.restore()
        with refusing_another_state():
            start = Position(**state.data["position"]) if state else Position()
        budget = share_epochs(stages, self.recipe.epochs_over(self.labelled, self.unlabelled))
        for number, (stage, epochs) in enumerate(zip(stages, budget, strict=True)):
            if number < start.stage or epochs == 0:
                continue
            self._enter(number, stage, epochs, sum(budget[:number]))
            if state is not None and number == start.stage:
                with refusing_another_state():
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
        self.sums: dict[str, Tensor] = {}  # sums of each value in this epoch, weighted by images
        self.losses = nn.ModuleDict({name: term.loss for name, term in stage.terms.items()}).to(self.fabric.device)
        learned = [*self.student.parameters(), *self.losses.parameters()]
        self.optimizer = create_optimizer(learned, self.recipe, self.fabric.device)
        self.average: WeightAverage | None = None
        self.graphed_student = self._graphed(self.student)
        for teaching in self.teaching:
            teaching.enter(stage, self._graphed)

    def _graphed(self, network: Backbone) -> GraphedNetwork | None:
        device, precision = self.fabric.device, resolve_precision(self.recipe.precision, self.fabric.device)
        if not (self.cuda_graphs and can_be_graphed(network, device, precision)):
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
        """Return an epoch's batches, labelled images first. Unlabelled images do not change their number."""
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
            taught = [teaching(images, batch, view.number) for teaching in self.teaching]
            seen = self._learn(images, len(batch))
            labelled = int((batch < self.labelled).sum())
            losses = {name: term(seen, read_by(term, taught), labels, labelled) for name, term in terms.items()}
            if self.views.mixed:
                share, others = self._mixed_in(batch, view)
                of_others = {
                    name: term(seen, read_by(term, taught), others, labelled)
                    for name, term in terms.items()
                    if term.reads_labels
                }
                losses |= {name: torch.lerp(loss, losses[name], share) for name, loss in of_others.items()}
            self.optimizer.zero_grad()
            fabric.backward(weighted_sum(weights, losses))
            self.world.sum_gradients(self.student.parameters(), self.losses.parameters())
            self._check_finite(losses, taught, batch, epoch, step)
            self._set_learning_rate(epoch + step / len(batches))
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
            self._record(losses, len(batch), Position(self.position.stage, epoch, step + 1))

    def _view(self, epoch: int, step: int, steps: int) -> View:
        """Return the view of a step: that of its epoch, or one of its own if the step mixes images."""
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

    def _learn(self, images: Tensor, count: int) -> Outputs:
        """Run the student on this process's images and return its outputs for the whole batch of ``count``."""
        parts = frozenset(term.student for term in self.stage.terms.values())
        if self.graphed_student is not None:
            return self.graphed_student(images, parts)
        with self.world.global_batch_norm():
            seen = cast(Outputs, self.learner(images, features="features" in parts))
        return self.world.gather_outputs(seen, count, parts)

    def _mixed_in(self, batch: Tensor, view: View) -> tuple[float, Tensor]:
        """Return the share of each image in a mixed batch, and the labels of the images mixed into it."""
        pixels, place = self.images.pixels, {"seed": view.seed, "view": view.number}
        share = self.views.mixing(pixels.shape[-1], **place).share
        return share, self._labels(self.views.partners_in(pixels, batch, **place))

    def _set_learning_rate(self, time: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.rate * learning_rate(self.recipe, self.epochs, time)

    def _check_finite(
        self, losses: Mapping[str, Tensor], taught: Sequence[Outputs | None], batch: Tensor, epoch: int, step: int
    ) -> None:
        """Raise an error before a step that would make the weights useless."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        on_cpu = self.fabric.device.type == "cpu"  # where all norms in one call have to be asked for
        norm = torch.nn.utils.get_total_norm(gradients, foreach=on_cpu or None)
        if torch.isfinite(norm + sum(loss.detach() for loss in losses.values())):
            return
        self._refuse_sick_teachers(taught, batch)
        values = ", ".join(f"{name} {loss.item():g}" for name, loss in losses.items())
        raise NonFiniteError(
            f"stage '{self.stage.name}', epoch {epoch + 1}, step {step + 1}: the loss or its gradient is not finite "
            f"({values}; gradient norm {norm.item():g}). The step was not taken. "
            "A lower --lr usually mends it; so can --precision 32-true or a smaller weight of the loss that grew"
        )

    def _refuse_sick_teachers(self, taught: Sequence[Outputs | None], batch: Tensor) -> None:
        hint = "" if self.recipe.precision == "32-true" else ". Its numbers may be too large for --precision bf16-mixed"
        for teaching, outputs in zip(self.teaching, taught, strict=True):
            if outputs is not None:
                sources = [self.task.source_of(row) for row in batch.tolist()]
                teaching.refuse_sick(outputs, sources, hint)

    def _record(self, losses: Mapping[str, Tensor], images: int, position: Position) -> None:
        values = {name: loss.detach() for name, loss in losses.items()}
        for term in self.stage.terms.values():
            if isinstance(term.loss, Reports):
                figures = term.loss.statistics()
                values.update({numbered(name, term.of): value for name, value in figures.items()})
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + images * value.double()
        self.sums["images"] = self.sums.get("images", torch.zeros(())) + images
        self.position = position
        self.journal.step(position, images, values)
        if self.journal.checkpoint_due():
            self.journal.save(self._state())

    def _entry(self, epoch: int) -> dict[str, Any]:
        """Summarise an epoch for the log. Only values that a repeated run reproduces are included, so no times."""
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
        heads_first = begins_with_heads(self.stage, self.recipe)
        taught = [teaching.precompute(self.task, for_heads=heads_first) for teaching in self.teaching]
        if heads_first:
            self._train_heads(taught)
        self._follow_weights()

    def _train_heads(self, taught: Sequence[Outputs | None]) -> None:
        train_heads(
            self.student,
            self.stage,
            self.recipe.head_steps,
            embed_seen(self.student, self.task, self.fabric, self.world),
            taught,
            self._labels(torch.arange(len(self.images.labels))),
            self.labelled,
            lambda lap: self._batches(lap % self.epochs),  # a stage of few steps has fewer epochs than laps
            self.world,
        )

    def _follow_weights(self) -> None:
        if self.recipe.ema > 0:
            self.average = WeightAverage(self.student, self.recipe.ema)

    def _state(self) -> State:
        tensors = {f"student/{name}": value for name, value in self.student.state_dict().items()}
        tensors |= {f"losses/{name}": value for name, value in self.losses.state_dict().items()}
        tensors |= {f"sums/{name}": value for name, value in self.sums.items()}
        tensors |= {f"optimizer/{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        tensors["random"] = torch.get_rng_state()
        if self.fabric.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state()
        if self.average is not None:
            tensors |= {f"average/{name}": value for name, value in self.average.values.items()}
            tensors["updates"] = torch.tensor(self.average.updates)
        lr = self.optimizer.param_groups[0]["lr"]
        # The names of the sums are saved because the log needs their order, which a file of tensors does not keep.
        return State(tensors, {"position": vars(self.position), "lr": lr, "sums": list(self.sums)})

    def _restore(self, state: State) -> None:
        self.position = Position(**state.data["position"])
        self.student.load_state_dict(dict(_under("student/", state.tensors)))
        self.losses.load_state_dict(dict(_under("losses/", state.tensors)))
        self.losses.to(self.fabric.device)  # tensors whose size only the state determines were created on the CPU
        self.sums = {name: state.tensors[f"sums/{name}"] for name in state.data["sums"]}
        restore_optimizer(self.optimizer, dict(_under("optimizer/", state.tensors)), self.fabric.device)
        self._follow_weights()
        if self.average is not None:
            self.average.restore(dict(_under("average/", state.tensors)), int(state.tensors["updates"]))
        for group in self.optimizer.param_groups:
            group["lr"] = state.data["lr"]
        torch.set_rng_state(state.tensors["random"])
        if "random_cuda" in state.tensors and self.fabric.device.type == "cuda":
            torch.cuda.set_rng_state(state.tensors["random_cuda"])


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), value) for name, value in tensors.items() if name.startswith(prefix))
