"""Few-shot students: one network per task, trained by the stages of a distillation method.

The losses are those of :mod:`refilled.methods`, unchanged, on the images of one task. Several ConvNet-4s can be trained
as one network with grouped convolutions.

The steps are not those of :mod:`refilled.training.loop`. That loop trains one network on one data set, and keeps a log
and states to resume from. Here many networks take each step together, each with its own losses and support images, and
a task is too short to be resumed. Optimiser, learning rate and division into stages are those of a run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from refilled.data import Episodes
from refilled.data.keyed import keyed_integers
from refilled.errors import NonFiniteError
from refilled.fewshot.bank import Bank, Learner
from refilled.fewshot.methods.linear import logistic_weights
from refilled.losses.distances import at_least_float32
from refilled.models import Backbone
from refilled.models.convnet import BLOCKS, CHANNELS, ConvNet4, conv_block, global_pool
from refilled.outputs import ModelShape, Outputs, not_computed
from refilled.ranges import COUNT, POSITIVE, WHOLE, check_fields
from refilled.recipe import Recipe
from refilled.stages import Stage, needs_training_set
from refilled.training.optimizers import create_optimizer
from refilled.training.precision import resolve_precision
from refilled.training.schedule import learning_rate, share_epochs

Stages = Callable[[ModelShape, ModelShape | None], Sequence[Stage]]
StudentPrecision = Literal["auto", "32-true", "bf16-mixed"]
Classifier = Literal["random", "probe"]
Norm = Literal["batch", "frozen"]


@dataclass(frozen=True, kw_only=True)
class StudentRecipe:
    """How a few-shot student is optimised: SGD on the support images of its task.

    Attributes:
        steps: Steps of all stages together. A step counts as an epoch in the schedules of loss weights.
        lr: Peak learning rate. It falls to 0 over each stage.
        momentum: Momentum of SGD.
        weight_decay: Factor of weight decay.
        copies: Views of each image per step. None: 1, or 2 for one-shot tasks, since a class with a single image has no
            positives.
        shots: Maximum number of support images per class in a step. The images take turns.
        views: Number of augmented views per image to cycle through. The frozen model embeds each view once for all
            tasks.
        classifier: Initial classifier. ``random``: random weights. ``probe``: the logistic regression on the student's
            embedding at that point, so that the gradients of a random classifier do not distort the embedding (Kumar et
            al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, ICLR 2022).
        probe_c: C of that regression, on embeddings scaled to mean length 1.
        norm: Statistics of batch norm. ``batch``: those of each batch, and those of the support images at the end.
            ``frozen``: those that the student starts with.
        together: Number of networks trained as one. None: 1 on a CPU, 64 elsewhere.
        precision: ``auto``: bfloat16 where the processor supports it, else float32.
        seed: Seed of the initial weights.
    """

    steps: int = 100
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    copies: int | None = None
    shots: int = 10
    views: int = 8
    classifier: Classifier = "random"
    probe_c: float = 10.0
    norm: Norm = "batch"
    together: int | None = None
    precision: StudentPrecision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self, steps=COUNT, copies=COUNT, shots=COUNT, views=COUNT, together=COUNT, probe_c=POSITIVE, seed=WHOLE
        )
        _ = self.of_a_run  # checks the values

    @property
    def of_a_run(self) -> Recipe:
        """The recipe of a run with the same optimiser and schedule."""
        return Recipe(lr=self.lr, momentum=self.momentum, nesterov=False, weight_decay=self.weight_decay, warmup=0)


class Students(nn.Module):
    """T networks, one per task."""

    def __init__(self, models: Sequence[Backbone]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor, features: bool = False) -> list[Outputs]:
        """Map uint8 images ``(T, B, 3, S, S)`` to the outputs of each task."""
        return [model(own, features=features) for model, own in zip(self.models, images, strict=True)]

    def reset_classifiers(self, generators: Sequence[torch.Generator]) -> None:
        """Draw new random weights for each classifier."""
        for model, generator in zip(self.models, generators, strict=True):
            assert isinstance(model, Backbone)
            model.reset_classifier(generator)

    def set_classifiers(self, weights: Tensor) -> None:
        """Set each classifier from ``(T, N, d + 1)``, the d weights followed by the intercept."""
        for model, own in zip(self.models, weights, strict=True):
            classifier = cast(nn.Linear, model.classifier)
            with torch.no_grad():
                classifier.weight.copy_(own[:, :-1])
                classifier.bias.copy_(own[:, -1])


class StackedConvNets(nn.Module):
    """T ConvNet-4s as one network that concatenates their channels.

    Convolutions are grouped and batch norm works per channel, so that the networks do not influence each other.

    Args:
        models: The networks, all with the same pooling and number of classes. Their weights are copied.
    """

    def __init__(self, models: Sequence[ConvNet4]) -> None:
        super().__init__()
        self.number, self.pool, self.first = len(models), models[0].pool, (models[0],)
        self.blocks = nn.ModuleList(
            conv_block(3 if number == 0 else CHANNELS, CHANNELS, len(models)) for number in range(BLOCKS)
        )
        for stacked, *blocks in zip(self.blocks, *(model.blocks for model in models), strict=True):
            states = [block.state_dict() for block in blocks]
            stacked.load_state_dict({name: _side_by_side([s[name] for s in states]) for name in states[0]})
        classifiers = [cast(nn.Linear, model.classifier) for model in models]
        self.weight = nn.Parameter(torch.stack([c.weight.detach() for c in classifiers]))
        self.bias = nn.Parameter(torch.stack([c.bias.detach() for c in classifiers]))
        self.to(models[0].mean)  # device and dtype

    def forward(self, images: Tensor, features: bool = False) -> list[Outputs]:
        """Map uint8 images ``(T, B, 3, S, S)`` to the outputs of each task."""
        batch = images.shape[1]
        x = self.first[0].normalize(images.transpose(0, 1).flatten(0, 1))  # (B T, 3, S, S)
        x = x.reshape(batch, -1, *x.shape[2:]).contiguous(memory_format=torch.channels_last)  # (B, 3 T, S, S)
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        embedding = global_pool(x, self.pool).unflatten(1, (self.number, CHANNELS)).transpose(0, 1)  # (T, B, 64)
        logits = torch.baddbmm(self.bias[:, None], embedding, self.weight.mT)
        own = zip(*(m.chunk(self.number, 1) for m in maps), strict=True) if features else [()] * self.number
        return [Outputs(*seen) for seen in zip(logits, embedding, own, strict=True)]

    def reset_classifiers(self, generators: Sequence[torch.Generator]) -> None:
        """Draw new random weights for each classifier, as each network alone would."""
        for task, generator in enumerate(generators):
            model = deepcopy(self.first[0])
            model.reset_classifier(generator)
            classifier = cast(nn.Linear, model.classifier)
            with torch.no_grad():
                self.weight[task].copy_(classifier.weight)
                self.bias[task].copy_(classifier.bias)

    def set_classifiers(self, weights: Tensor) -> None:
        """Set each classifier from ``(T, N, d + 1)``, the d weights followed by the intercept."""
        with torch.no_grad():
            self.weight.copy_(weights[..., :-1])
            self.bias.copy_(weights[..., -1])


def _side_by_side(values: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(values)) if values[0].ndim else values[0]  # the counter of batches is shared


def students(models: Sequence[Backbone]) -> Students | StackedConvNets:
    """Group the networks of some tasks. Several ConvNet-4s become one network."""
    convnets = [model for model in models if isinstance(model, ConvNet4)]
    if len(convnets) == len(models) > 1:
        return StackedConvNets(convnets)
    return Students(models).to(memory_format=torch.channels_last)


def with_classifier(model: Backbone, num_classes: int) -> Backbone:
    """Return a trainable copy of a model with a new classifier for ``num_classes`` classes."""
    copy = deepcopy(model).requires_grad_(True)
    copy.classifier = nn.Linear(copy.embedding_dim, num_classes).to(copy.mean.device)
    copy.num_classes, copy.class_names = num_classes, tuple(map(str, range(num_classes)))
    return copy


def student_learner(bank: Bank, create: Callable[[int], Backbone], stages: Stages, recipe: StudentRecipe) -> Learner:
    """Train a student for each task, and classify the queries with it.

    Args:
        bank: The images, with the teacher as the frozen model.
        create: Makes an untrained student for a number of classes. It is called under the random state of its task.
        stages: The stages of the method for a student and the teacher.
        recipe: How the students are optimised.
    """
    together = recipe.together or (1 if bank.device.type == "cpu" else 64)

    def learner(episodes: Episodes) -> Tensor:
        groups = torch.arange(len(episodes.numbers)).split(together)
        return torch.cat([_Group(bank, create, stages, recipe, some_of(episodes, group)).scores() for group in groups])

    return learner


def some_of(episodes: Episodes, which: Tensor) -> Episodes:
    """Return some of the tasks."""
    return episodes._replace(
        numbers=episodes.numbers[which],
        classes=episodes.classes[which],
        support=episodes.support[which],
        query=episodes.query[which],
    )


class _Group:
    """The students of some tasks, trained together."""

    def __init__(
        self,
        bank: Bank,
        create: Callable[[int], Backbone],
        stages: Stages,
        recipe: StudentRecipe,
        episodes: Episodes,
    ) -> None:
        self.bank, self.recipe, self.episodes = bank, recipe, episodes
        classes = int(episodes.labels.max()) + 1
        self.shots = len(episodes.labels) // classes
        teacher = bank.model if bank.has_model else None
        models, self.stages = [], []
        for seed in self._seeds("student"):
            with _random_state(seed):  # for the weights and for adapters in the losses
                models.append(create(classes).to(bank.device))
                self.stages.append(stages(models[-1], teacher))
        self.students = students(models).to(bank.device)

    def scores(self) -> Tensor:
        """Train, and return the scores ``(T, Q, N)`` of the queries."""
        for number, steps in enumerate(share_epochs(self.stages[0], self.recipe.steps)):
            if steps > 0:
                self._train([stages[number] for stages in self.stages], steps, first=number == 0)
        with torch.no_grad(), self._autocast():
            if self.recipe.norm == "batch":
                self._take_statistics()
            self.students.eval()
            queries = self.bank.images(self.episodes.query).to(self.bank.device)
            return torch.stack([seen.logits.float() for seen in self.students(queries)]).cpu()

    def _train(self, stages: Sequence[Stage], steps: int, first: bool) -> None:
        device, recipe = self.bank.device, self.recipe
        self._set_mode()
        if recipe.classifier == "probe" and (first or stages[0].classifier == "fresh"):
            self.students.set_classifiers(self._probe())
        elif stages[0].classifier == "fresh":
            seeds = self._seeds(f"classifier of {stages[0].name}")
            self.students.reset_classifiers([torch.Generator().manual_seed(seed) for seed in seeds])
        losses = nn.ModuleList(term.loss for stage in stages for term in stage.terms.values()).to(device)
        self._precompute(stages)
        parameters = [*self.students.parameters(), *losses.parameters()]
        of_a_run = recipe.of_a_run
        optimizer = create_optimizer(parameters, of_a_run, device)
        for step in range(steps):
            loss = self._loss(stages, step)
            optimizer.zero_grad()
            loss.backward()
            if not loss.isfinite():
                raise NonFiniteError(
                    f"stage '{stages[0].name}', step {step + 1}: the loss of a few-shot student is not finite; a lower "
                    "lr usually helps: --set lr=..."
                )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(of_a_run, steps, step)
            optimizer.step()

    def _set_mode(self) -> None:
        self.students.train()
        if self.recipe.norm == "frozen":
            for module in self.students.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def _probe(self) -> Tensor:
        """Return weights and intercepts ``(T, N, d + 1)`` of logistic regressions on the students' embeddings."""
        with torch.no_grad():
            seen = self.students(self.bank.images(self.episodes.support).to(self.bank.device))
        embedding = torch.stack([outputs.embedding for outputs in seen])  # (T, S, d)
        length = torch.linalg.vector_norm(embedding, dim=2).mean(1)[:, None, None]
        labels = self.episodes.labels.to(embedding.device)
        weights = logistic_weights(embedding / length, labels, c=self.recipe.probe_c)
        return torch.cat([weights[..., :-1] / length, weights[..., -1:]], 2)

    def _loss(self, stages: Sequence[Stage], step: int) -> Tensor:
        """Sum the losses of all tasks. Each task's weights receive gradients from its own loss only."""
        copies = self.recipe.copies or (2 if self.shots == 1 else 1)
        views = [(step * copies + copy) % self.recipe.views for copy in range(copies)]
        turn = self._turn(step)
        support, labels = self.episodes.support[:, turn], self.episodes.labels[turn].repeat(copies)
        labels = labels.to(self.bank.device)
        images = torch.cat([self.bank.images(support, view) for view in views], 1).to(self.bank.device)
        features = any(term.student == "features" for term in stages[0].terms.values())
        with self._autocast():
            seen = [_for_losses(outputs) for outputs in self.students(images, features=features)]
        taught = self._teach(stages[0], images, support, views)
        return torch.stack(
            [
                term.weight(step) * term(seen[task], taught[task], labels)
                for task, stage in enumerate(stages)
                for term in stage.terms.values()
            ]
        ).sum()

    def _autocast(self) -> torch.autocast:
        precision = resolve_precision(self.recipe.precision, self.bank.device)
        return torch.autocast(self.bank.device.type, torch.bfloat16, enabled=precision == "bf16-mixed")

    def _turn(self, step: int) -> Tensor:
        """Return the indices of the support images that a step uses, the same number per class."""
        taken = min(self.shots, self.recipe.shots)
        of_a_class = (step * taken + torch.arange(taken)) % self.shots
        classes = len(self.episodes.labels) // self.shots
        return (self.shots * torch.arange(classes)[:, None] + of_a_class).flatten()  # images are sorted by class

    def _teach(self, stage: Stage, images: Tensor, support: Tensor, views: Sequence[int]) -> Sequence[Outputs | None]:
        if not stage.needs_teacher:
            return [None] * len(images)
        if stage.reads("features"):
            with torch.no_grad():
                return [self.bank.model(own, features=True) for own in images]
        embedding = torch.cat([self.bank.embedding(support, view) for view in views], 1)
        return [Outputs(not_computed(len(own), own), own) for own in embedding.to(self.bank.device)]

    def _take_statistics(self) -> None:
        """Recompute the statistics of batch norm over the views of the support images.

        Running statistics average over steps in which the weights still changed. After the few steps here they do not
        match the final network (Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021).
        """
        for module in self.students.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # a plain mean
        self.students.train()
        for view in range(self.recipe.views):
            self.students(self.bank.images(self.episodes.support, view).to(self.bank.device))

    def _precompute(self, stages: Sequence[Stage]) -> None:
        labels = self.episodes.labels.to(self.bank.device)
        for task, stage in enumerate(stages):
            for term in stage.terms.values():
                if needs_training_set(term.loss):
                    embedding = self.bank.embedding(self.episodes.support[task])
                    term.loss.precompute(embedding.to(self.bank.device), labels)

    def _seeds(self, purpose: str) -> list[int]:
        drawn: list[int] = keyed_integers(2**31, self.recipe.seed, purpose, self.episodes.numbers.numpy()).tolist()
        return drawn


def _for_losses(outputs: Outputs) -> Outputs:
    """Convert outputs to a dtype in which losses can be computed."""
    logits, embedding, *features = map(at_least_float32, (outputs.logits, outputs.embedding, *outputs.features))
    return Outputs(logits, embedding, tuple(features))


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Seed torch's global random state, from which weights are drawn, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
