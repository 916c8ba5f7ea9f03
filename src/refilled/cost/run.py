"""The predicted cost of a run (``--dry-run``)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from refilled.config import Run
from refilled.cost.step import Cost, Network, Probe, made_up_task, probe_batches, scoring_cost
from refilled.data import TaskSize, free_memory, task_size
from refilled.files import cache_folder
from refilled.models import Backbone
from refilled.runs.examination import SAMPLE_IMAGES
from refilled.runs.prepared import Prepared, resolve
from refilled.stages import Part, Stage, needs_training_set
from refilled.training.evaluation import SCORING_BATCH
from refilled.training.heads import begins_with_heads, heads_read_teacher
from refilled.training.loop import views_of
from refilled.training.progress import duration
from refilled.training.schedule import share_epochs
from refilled.words import count_of

_FLOAT = 4  # bytes
_IMAGES = 32  # random, to build the run with


@dataclass(frozen=True)
class StageForecast:
    """The predicted cost of a stage of training."""

    name: str
    epochs: int
    steps: int
    """Steps per epoch."""
    seconds: float
    """Seconds per step."""
    communication: float
    """Part of these seconds that is communication between processes."""
    sees_unlabelled: bool = False
    """Whether its batches contain unlabelled images also."""
    head_steps: int = 0
    """Steps before the first epoch that train only the heads."""
    head_seconds: float = 0.0
    """Seconds per step of these."""


@dataclass(frozen=True)
class Forecast:
    """The predicted cost of a run.

    Attributes:
        run: The run with all settings resolved.
        size: The size of its task.
        rates: Images per second of individual parts of the work.
        stages: The stages of training.
        seconds: Seconds of loading, training and scoring.
        memory: Peak memory in bytes, of the accelerator or of the process; None if it cannot be measured.
        ranks: Number of processes.
    """

    run: Run
    size: TaskSize
    rates: Mapping[str, float]
    stages: tuple[StageForecast, ...]
    seconds: Mapping[str, float]
    memory: float | None
    ranks: int

    @property
    def total(self) -> float:
        """Total seconds."""
        return sum(self.seconds.values())

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the forecast as pairs of a heading and a text."""
        size, run = self.size, self.run
        extra = f" and {size.unlabelled} without labels" if size.unlabelled else ""
        counts = f"{count_of(size.train, 'image')} to train on{extra}, {size.val} to validate, {size.test} to test"
        yield "task", f"{count_of(len(size.class_names), 'class')}; {counts}; {size.image_size} px"
        on_disk = sum(part for part in _image_bytes(size) if part > _image_limit(run))
        if on_disk:
            yield "images on disk", f"{on_disk / 2**30:.1f} GiB below {cache_folder()}"
        for name, rate in self.rates.items():
            yield name, f"{rate:,.0f} images/s"
        for stage in (stage for stage in self.stages if stage.epochs > 0):
            rate = sum(run.batch_over(size.train, size.unlabelled if stage.sees_unlabelled else 0)) / stage.seconds
            epochs = f"{count_of(stage.epochs, 'epoch')} of {count_of(stage.steps, 'step')}"
            yield f"stage {stage.name}", f"{epochs}, {1000 * stage.seconds:.3g} ms per step, {rate:,.0f} images/s"
            if stage.head_steps:
                yield (
                    "",
                    f"after {count_of(stage.head_steps, 'step')} of the heads, {1000 * stage.head_seconds:.3g} ms each",
                )
            if self.ranks > 1:
                share = f"{1000 * stage.communication:.3g} ms per step between {self.ranks} processes"
                yield "", f"{share}, modelled, not measured"
        for name, seconds in self.seconds.items():
            yield name, duration(seconds)
        threads = "one thread" if run.threads == 1 else f"{run.threads} threads"
        where = f"{threads} of the processor" if run.device == "cpu" else run.device
        yield "in all", f"about {duration(self.total)} on {where}"
        yield "memory", "cannot be predicted here" if self.memory is None else f"about {self.memory / 2**30:.2f} GiB"

    def to_dict(self) -> dict[str, Any]:
        """Return the forecast as plain data."""
        return {**asdict(self), "total": self.total}


def forecast(run: Run, ranks: int = 1, network: Network | None = None) -> Forecast:
    """Predict the cost of a run. Its names, settings and data are checked, and nothing is written.

    The images of a batch are divided among the ranks, and so are the scored images. A method that trains nothing has
    no stages, and the cost of its readout is not predicted.

    Raises:
        RefilledError: The run has a fault that can be found before training.
    """
    run, network = resolve(run), network or Network()
    size, prepared = on_made_up_images(run)
    student, teachers, stages = prepared.student, prepared.teachers, prepared.stages
    fabric = Fabric(accelerator=run.device, devices=1, precision=run.precision)  # type: ignore[arg-type]
    batch = _largest_batch(stages, run, size, ranks)
    batches = probe_batches(run.device, batch)
    probes = [Probe(student, teachers, stage, size, run, fabric) for stage in stages]
    costs = _Costs(
        student=scoring_cost(student, size, run, fabric, fully=True),
        validation=scoring_cost(student, size, run, fabric),
        teachers=tuple(scoring_cost(teacher, size, run, fabric) for teacher in teachers),
        steps=tuple(probe.step_cost(batches) for probe in probes),
    )
    passes = [_passes_of_a_teacher(stages, number, run) for number in range(len(teachers))]
    widths = [
        teacher.embedding_dim for number, teacher in enumerate(teachers) if _preparing_stages(stages, number, run)
    ]
    heads_first = any(begins_with_heads(stage, run) for stage in stages)
    own_width = student.embedding_dim if heads_first or prepared.readout is not None else 0
    width = max(widths, default=0) + own_width
    predicted = []
    budget = share_epochs(stages, run.epochs_over(size.train, size.unlabelled)) if stages else []
    for stage, probe, step, epochs in zip(stages, probes, costs.steps, budget, strict=True):
        own = _largest_batch([stage], run, size, ranks)
        spared = sum(
            cost.seconds(own) for number, cost in enumerate(costs.teachers) if _is_cached(stage.taught_by(number), run)
        )
        messages = communication(student, teachers, stage, run.batch_size, ranks, network)
        # At least the student's own pass: the difference between two measurements can be 0 on a busy machine.
        seconds = max(step.seconds(own) - spared, costs.validation.seconds(own)) + messages
        steps = run.steps_over(size.train, size.unlabelled)
        head_steps = run.head_steps if epochs and begins_with_heads(stage, run) else 0
        whole = _largest_batch([stage], run, size, 1)  # each rank takes all steps of the heads
        head = probe.head_step_seconds(whole) if head_steps else 0.0
        predicted.append(
            StageForecast(stage.name, epochs, steps, seconds, messages, stage.sees_unlabelled, head_steps, head)
        )
    return Forecast(
        run=run,
        size=size,
        rates={"decoding": size.images_per_second, "input pipeline": _pipeline_rate(size, run), **costs.rates()},
        stages=tuple(predicted),
        seconds=_seconds(run, size, costs, predicted, passes, ranks),
        memory=_memory(run, size, costs, batch, any(passes), width),
        ranks=ranks,
    )


def on_made_up_images(run: Run) -> tuple[TaskSize, Prepared]:
    """Return the sizes of a resolved run's task, and the run prepared on a few made-up images; none is loaded."""
    size = _size_of(run)
    return size, Prepared(run, made_up_task(size, _IMAGES))


@dataclass(frozen=True)
class _Costs:
    """The measured costs of scoring with either network, and of a step of each stage."""

    student: Cost
    """In float32, as for the result."""
    validation: Cost
    teachers: tuple[Cost, ...]
    steps: tuple[Cost, ...]

    def rates(self) -> dict[str, float]:
        """Return the images per second of each network, without gradients."""
        of_teachers = {f"teacher {number}": cost for number, cost in enumerate(self.teachers, start=1)}
        if len(self.teachers) == 1:
            of_teachers = {"teacher": self.teachers[0]}
        return {name: 1 / _each(cost) for name, cost in {"student, scoring": self.student, **of_teachers}.items()}


def _largest_batch(stages: Sequence[Stage], run: Run, size: TaskSize, ranks: int) -> int:
    """Return the largest number of images per step and process, over the stages."""
    unlabelled = size.unlabelled if any(stage.sees_unlabelled for stage in stages) else 0
    return math.ceil(sum(run.batch_over(size.train, unlabelled)) / ranks)


def _each(scoring: Cost) -> float:
    return scoring.seconds(SCORING_BATCH) / SCORING_BATCH


def _is_cached(stage: Stage, run: Run) -> bool:
    return run.views is not None and stage.embedding_suffices


def _preparing_stages(stages: Sequence[Stage], number: int, run: Run) -> int:
    """Return the number of stages that begin with a teacher's embedding of the whole training set."""

    def prepares(stage: Stage) -> bool:
        by_loss = any(needs_training_set(term.loss) for term in stage.terms.values())
        return by_loss or (begins_with_heads(stage, run) and heads_read_teacher(stage))

    return sum(prepares(stage.taught_by(number)) for stage in stages)


def _passes_of_a_teacher(stages: Sequence[Stage], number: int, run: Run) -> int:
    """Return how often a teacher embeds each training image outside the steps, for the cache and for losses."""
    views = run.views or 0
    cached = any(_is_cached(stage.taught_by(number), run) for stage in stages)
    return _preparing_stages(stages, number, run) + views * cached


def _seconds(
    run: Run,
    size: TaskSize,
    costs: _Costs,
    stages: Sequence[StageForecast],
    passes: Sequence[int],
    ranks: int,
) -> dict[str, float]:
    score, validate = _each(costs.student) / ranks, _each(costs.validation) / ranks
    teach = sum(count * _each(cost) for count, cost in zip(passes, costs.teachers, strict=True)) / ranks
    judge = min(size.train, SAMPLE_IMAGES) * sum(map(_each, costs.teachers))  # by rank 0, while the others wait
    scored = size.test if run.score == "test" else size.val
    embed = (size.train + size.unlabelled) * validate  # by the student, for its heads
    heads = sum(embed + s.head_steps * s.head_seconds for s in stages if s.head_steps)
    return {
        "loading": (size.train + size.unlabelled + size.val + size.test) / size.images_per_second,
        "embedding by the teacher": (size.train + size.unlabelled) * teach + judge,
        "training": heads + sum(s.epochs * (s.steps * s.seconds + size.val * validate) for s in stages),
        "scoring": max(len(stages), 1) * (size.train + scored) * score,
    }


def _memory(run: Run, size: TaskSize, costs: _Costs, batch: int, passes: bool, width: int) -> float | None:
    """Return the higher peak of training and scoring, plus the data that stays in memory.

    This data is the images, and the embeddings of dimension ``width`` of the training images, once in batches and once
    in one tensor, for readouts and for losses that use the whole training set.
    """
    scored = min(SCORING_BATCH, size.train)
    scoring = [costs.student] + (list(costs.teachers) if passes else [])
    peaks = [cost.memory(batch) for cost in costs.steps if cost.memory is not None]
    peaks += [cost.memory(scored) for cost in scoring if cost.memory is not None]
    if not peaks:
        return None
    if run.device != "cpu":
        return max(peaks)
    images = sum(part for part in _image_bytes(size) if part <= _image_limit(run))
    return max(peaks) + images + 2 * _FLOAT * (size.train + size.unlabelled) * width


def _image_bytes(size: TaskSize) -> list[int]:
    return [count * 3 * size.image_size**2 for count in (size.train, size.val, size.test, size.unlabelled)]


def _image_limit(run: Run) -> float:
    return free_memory() / 4 if run.image_memory is None else run.image_memory * 2**30


def communication(
    student: Backbone, teachers: Sequence[Backbone], stage: Stage, batch: int, ranks: int, network: Network
) -> float:
    """Return the modelled seconds per step of communication between ranks.

    The outputs that the losses read are gathered; feature maps are not counted. The statistics of batch norm are
    summed in the forward and backward pass. The gradients are also summed.
    """
    pairs: list[tuple[Backbone, set[Part | None]]] = [(student, {term.student for term in stage.terms.values()})]
    for number, teacher in enumerate(teachers):
        pairs.append((teacher, {term.teacher for term in stage.taught_by(number).terms.values()}))
    read = 0
    for model, parts in pairs:
        widths: dict[Part, int] = {"logits": model.num_classes, "embedding": model.embedding_dim}
        read += sum(width for part, width in widths.items() if part in parts)
    norms = [module.num_features for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    gradient = sum(parameter.numel() for parameter in student.parameters())
    return (
        network.all_gather(_FLOAT * batch * read, ranks)
        + sum(2 * network.all_reduce(_FLOAT * 2 * channels, ranks) for channels in norms)
        + network.all_reduce(_FLOAT * gradient, ranks)
    )


def _pipeline_rate(size: TaskSize, run: Run) -> float:
    """Return the images per second that are gathered, augmented and mixed."""
    task, taken = made_up_task(size, _IMAGES), []
    views = views_of(run, task)
    for _ in range(4):
        start, every = perf_counter(), torch.arange(_IMAGES)
        views.load(task.train.pixels, every, seed=0, view=0)
        taken.append(perf_counter() - start)
    return _IMAGES / median(taken[1:])


def _size_of(run: Run) -> TaskSize:
    root = Path(run.data_root) if run.data_root else None
    return task_size(
        run.task,
        data_root=root,
        shots=run.shots,
        val=run.val,
        image_size=run.image_size,
        unlabelled=run.unlabelled,
    )
