"""What a run will cost, in time and memory, found from a few small steps before anything is trained.

The loop of training itself is timed on made-up images, at two sizes of batch. Its cost is a fixed part, such as the
optimiser's, and a part that grows with the images; the line through the two sizes is followed to the size that is asked
for. Of memory the same holds. What passes between several processes cannot be timed in one, and is modelled.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Self

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from refilled.checkpoints import State
from refilled.data import Split, Task, TaskSize, augment, free_memory, task_size
from refilled.evaluation import SCORING_BATCH, predict
from refilled.experiment import prepare, resolve
from refilled.files import cache_folder
from refilled.models import Backbone
from refilled.run import Run
from refilled.stages import Prepares, Stage
from refilled.training import Position, augmentation_of, fit, share_epochs

_BATCHES_ON_A_CPU = (8, 32)  # images a step; more are timed on an accelerator only, which few do not fill
_STEPS = 3  # timed, after one that warms up
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Line:
    """A cost that is ``fixed`` and, besides, ``each`` for every image."""

    fixed: float
    each: float

    @classmethod
    def through(cls, small: tuple[int, float], large: tuple[int, float]) -> Self:
        """Draw the line through two measurements, (images, cost).

        Neither part is below 0, whatever the noise; one size twice gives a cost in proportion.
        """
        (fewer, less), (images, cost) = small, large
        slope = (cost - less) / (images - fewer) if images > fewer else math.inf
        each = min(max(slope, 0.0), cost / images)
        return cls(max(cost - each * images, 0.0), each)

    def __call__(self, images: int) -> float:
        """Follow the line to so many images."""
        return self.fixed + self.each * images


@dataclass(frozen=True)
class Cost:
    """What an amount of work costs, by the images that are worked on at a time."""

    seconds: Line
    memory: Line | None
    """Bytes at the peak: of the accelerator, or of the whole process on a processor; None where they are not told."""


@dataclass(frozen=True)
class Network:
    """What lies between processes. The default, a good 100 Gbit/s link, is an assumption and no measurement."""

    bandwidth: float = 10e9
    """Bytes a second, in each direction."""
    latency: float = 20e-6
    """Seconds a message."""

    def all_gather(self, size: float, ranks: int) -> float:
        """Seconds until every rank has all of ``size`` bytes of which each had its part.

        Large parts travel around a ring, all but a rank's own to each; small ones along a tree.
        """
        return (ranks - 1) * size / ranks / self.bandwidth + math.ceil(math.log2(ranks)) * self.latency

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds until every rank has the sum of ``size`` bytes that each has: parts are summed, then gathered."""
        return 2 * self.all_gather(size, ranks)


@dataclass(frozen=True)
class StageForecast:
    """What a stage of training will cost."""

    name: str
    epochs: int
    steps: int
    """In an epoch."""
    seconds: float
    """A step."""
    communication: float
    """Seconds of these that pass between several processes."""


@dataclass(frozen=True)
class Forecast:
    """What a run will cost.

    Attributes:
        run: The run with everything settled.
        size: Its task.
        rates: Images a second of parts of the work on their own.
        stages: The stages of training.
        seconds: Of loading, training and scoring.
        memory: Bytes at the peak, of the accelerator or of the process; None where they cannot be asked for.
        ranks: Processes.
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
        """Seconds in all."""
        return sum(self.seconds.values())

    def rows(self) -> Iterator[tuple[str, str]]:
        """Say it in words, as pairs of a heading and a text."""
        size, run = self.size, self.run
        counts = f"{size.train} images to train on, {size.val} to validate, {size.test} to test"
        yield "task", f"{len(size.class_names)} classes; {counts}; {size.image_size} px"
        on_disk = sum(part for part in _image_bytes(size) if part > _image_limit(run))
        if on_disk:
            yield "images on disk", f"{on_disk / 2**30:.1f} GiB below {cache_folder()}"
        for name, rate in self.rates.items():
            yield name, f"{rate:,.0f} images/s"
        for stage in self.stages:
            rate = min(run.batch_size, size.train) / stage.seconds
            epochs = f"{stage.epochs} epochs of {stage.steps} steps"
            yield f"stage {stage.name}", f"{epochs}, {1000 * stage.seconds:.3g} ms a step, {rate:,.0f} images/s"
            if self.ranks > 1:
                share = f"{1000 * stage.communication:.3g} ms of a step between {self.ranks} processes"
                yield "", f"{share}, modelled and not measured"
        for name, seconds in self.seconds.items():
            yield name, duration(seconds)
        where = f"{run.threads} threads of the processor" if run.device == "cpu" else run.device
        yield "in all", f"about {duration(self.total)} on {where}"
        yield "memory", "cannot be predicted here" if self.memory is None else f"{self.memory / 2**30:.2f} GiB at most"

    def to_dict(self) -> dict[str, Any]:
        """Turn it into plain data."""
        return {**asdict(self), "total": self.total}


def forecast(run: Run, ranks: int = 1, network: Network | None = None) -> Forecast:
    """Predict what a run will cost; its names, settings and data are looked up and checked, and nothing is written.

    The images of a batch are shared out among the ranks, as are those that are scored. A method that trains nothing
    has no stages, and what it does with the embeddings is not predicted.

    Raises:
        RefilledError: anything in the run that cannot work, as far as it can be found before training.
    """
    run, network = resolve(run), network or Network()
    size = _size_of(run)
    prepared = prepare(run, made_up_task(size, _BATCHES_ON_A_CPU[-1]))
    fabric = Fabric(accelerator=run.device, devices=1, precision=run.precision)  # type: ignore[arg-type]
    student, teacher, stages = prepared.student, prepared.teacher, prepared.stages
    batch = math.ceil(min(run.batch_size, size.train) / ranks)
    batches = probe_batches(run.device, batch)

    forward = scoring_cost(student, size, run, fabric)
    taught = None if teacher is None else scoring_cost(teacher, size, run, fabric)
    steps = [step_cost(student, teacher, stage, size, run, fabric, batches) for stage in stages]
    between = [communication(student, teacher, stage, run.batch_size, ranks, network) for stage in stages]
    score, teach = (0.0 if c is None else c.seconds(SCORING_BATCH) / SCORING_BATCH / ranks for c in (forward, taught))

    found, training, embedded, passes = [], 0.0, 0, [forward]
    budget = share_epochs(stages, run.epochs) if stages else []
    for stage, cost, messages, epochs in zip(stages, steps, between, budget, strict=True):
        seconds = cost.seconds(batch) + messages
        if run.views is not None and taught is not None and stage.needs_only_embedding:
            seconds = max(seconds - taught.seconds(batch), 0.0)
            embedded = run.views * size.train
            passes.append(taught)
        count = math.ceil(size.train / run.batch_size)
        found.append(StageForecast(stage.name, epochs, count, seconds, messages))
        training += epochs * (count * seconds + size.val * score)
        if any(isinstance(t.loss, Prepares) and t.loss.needs_training_set for t in stage.terms.values()):
            training += size.train * teach
            passes += [taught] if taught is not None else []
    scored = size.test if run.score == "test" else size.val
    rates = {
        "decoding": size.images_per_second,
        "input pipeline": _pipeline_rate(size, run),
        "student alone, scoring": SCORING_BATCH / forward.seconds(SCORING_BATCH),
    }
    if taught is not None:
        rates["teacher"] = SCORING_BATCH / taught.seconds(SCORING_BATCH)
    return Forecast(
        run=run,
        size=size,
        rates=rates,
        stages=tuple(found),
        seconds={
            "loading": (size.train + size.val + size.test) / size.images_per_second,
            "training": training + embedded * teach,
            "scoring": max(len(stages), 1) * (size.train + scored) * score,
        },
        memory=_memory(size, run, student, batch, steps, passes),
        ranks=ranks,
    )


def step_cost(
    student: Backbone,
    teacher: Backbone | None,
    stage: Stage,
    size: TaskSize,
    run: Run,
    fabric: Fabric,
    batches: tuple[int, int],
) -> Cost:
    """Measure a step of a stage, as the training loop takes it; the student's weights change.

    Args:
        student: The student.
        teacher: The teacher, frozen; None for a stage that needs none.
        stage: The stage.
        size: The task's classes and image size.
        run: The run, resolved.
        fabric: The device and precision.
        batches: The two sizes of batch, in images, to draw the line through; see :func:`probe_batches`.
    """
    # Made-up images teach nothing; so as not to let the loss explode, the steps are tiny.
    recipe = replace(run, epochs=1, lr=1e-9, warmup=0.0, sampler="shuffle", views=None)

    def take_steps(images: int) -> float:
        clock, task = _Clock(), made_up_task(size, _images(images))
        fit(student, teacher, task, [replace(stage, share=1.0)], replace(recipe, batch_size=images), fabric, clock)
        return median(after - before for before, after in pairwise(clock.ticks))

    return _cost_of(take_steps, batches, fabric.device)


def probe_batches(device: str, most: int) -> tuple[int, int]:
    """Choose the two sizes of batch to measure; none of one image, which batch normalisation may refuse."""
    small, large = _BATCHES_ON_A_CPU if device == "cpu" else (math.ceil(most / 2), most)
    return min(small, max(2, most // 2), most), min(large, most)


def scoring_cost(network: Backbone, size: TaskSize, run: Run, fabric: Fabric) -> Cost:
    """Measure a network's forward pass as it is done to score images: without gradients, not augmented."""
    network.to(fabric.device)

    def score(images: int) -> float:
        pixels, taken = made_up_task(size, images).train.pixels, []
        for _ in range(1 + _STEPS):
            start = perf_counter()
            with fabric.autocast():
                predict(network, pixels, fabric.device)  # its outputs come to the processor: the device is done then
            taken.append(perf_counter() - start)
        return median(taken[1:])

    return _cost_of(score, probe_batches(run.device, SCORING_BATCH), fabric.device)


def made_up_task(size: TaskSize, images: int) -> Task:
    """Make a task of noise with the classes and the image size of another one, and so many images to train on."""
    shape = (images, size.image_size, size.image_size, 3)
    pixels = torch.randint(256, shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.arange(images) % len(size.class_names)
    train, one = (Split(pixels[:n], labels[:n], ("",) * n) for n in (images, 1))
    nothing = Split(pixels[:0], labels[:0], ())
    val, test = (one if count else nothing for count in (size.val, size.test))
    return Task("made up", size.class_names, train, val, test, size.image_size, size.augmentation, fingerprint="")


def duration(seconds: float) -> str:
    """Say a time in the unit that suits it."""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} seconds"


def _size_of(run: Run) -> TaskSize:
    root = Path(run.data_root) if run.data_root else None
    return task_size(run.task, data_root=root, shots=run.shots, val=run.val, image_size=run.image_size)


def _images(batch: int) -> int:
    return batch * (1 + _STEPS)


def _cost_of(work: Callable[[int], float], sizes: tuple[int, int], device: torch.device) -> Cost:
    points = []
    for size in sizes:
        _forget_peak(device)
        points.append((work(size), _peak(device)))
    (less, low), (more, high) = points
    seconds = Line.through((sizes[0], less), (sizes[1], more))
    memory = None if low is None or high is None else Line.through((sizes[0], low), (sizes[1], high))
    return Cost(seconds, memory)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets the peak alone


def _peak(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():  # without it the peak may be of long ago
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return None if found is None else 1024.0 * int(found[1])


def _memory(
    size: TaskSize, run: Run, student: Backbone, batch: int, steps: Sequence[Cost], passes: Sequence[Cost]
) -> float | None:
    """Add up the peak of training, that of scoring, and what lies in memory all the while."""
    training, scoring = ([cost.memory for cost in costs if cost.memory is not None] for costs in (steps, passes))
    if not scoring:
        return None
    scored = min(SCORING_BATCH, size.train)
    if run.device != "cpu":
        return max([line(batch) for line in training] + [line(scored) for line in scoring])
    images = sum(part for part in _image_bytes(size) if part <= _image_limit(run))
    # Embeddings and logits of the training images, once in batches and once in one piece.
    outputs = 2 * _FLOAT * size.train * (student.embedding_dim + len(size.class_names))
    if not training:
        return max(line(scored) for line in scoring) + images + outputs
    # What training has freed, the C library has mostly not given back when scoring asks for larger pieces.
    return max(line(batch) for line in training) + max(line.each * scored for line in scoring) + images + outputs


def _image_bytes(size: TaskSize) -> list[int]:
    return [count * 3 * size.image_size**2 for count in (size.train, size.val, size.test)]


def _image_limit(run: Run) -> float:
    return free_memory() / 4 if run.image_memory is None else run.image_memory * 2**30


def communication(
    student: Backbone, teacher: Backbone | None, stage: Stage, batch: int, ranks: int, network: Network
) -> float:
    """Model the seconds of a step that pass between ranks.

    The outputs that the losses read are gathered, but feature maps are not counted; statistics of batch norm are summed
    on the way there and back; and so are the gradients.
    """
    read = 0
    for model, parts in (
        (student, {term.student for term in stage.terms.values()}),
        (teacher, {term.teacher for term in stage.terms.values()}),
    ):
        if model is not None:
            widths = {"logits": model.num_classes, "embedding": model.embedding_dim}
            read += sum(width for part, width in widths.items() if part in parts)
    norms = [module.num_features for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    gradient = sum(parameter.numel() for parameter in student.parameters())
    return (
        network.all_gather(_FLOAT * batch * read, ranks)
        + sum(2 * network.all_reduce(_FLOAT * 2 * channels, ranks) for channels in norms)
        + network.all_reduce(_FLOAT * gradient, ranks)
    )


def _pipeline_rate(size: TaskSize, run: Run) -> float:
    """Images a second that are gathered and augmented."""
    task = made_up_task(size, _images(min(run.batch_size, 64)))
    kind, taken = augmentation_of(run, task), []
    batches = torch.arange(len(task.train)).split(len(task.train) // (1 + _STEPS))
    for batch in batches:
        start = perf_counter()
        augment(task.train.pixels.index_select(0, batch), batch, seed=0, view=0, kind=kind)
        taken.append(perf_counter() - start)
    return len(batches[0]) / median(taken[1:])


class _Clock:
    """A :class:`~refilled.training.Journal` that keeps nothing but the time after each step."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def step(self, position: Position, images: int, values: Mapping[str, Tensor]) -> None:
        for value in values.values():
            value.item()  # an accelerator is done with the step only now
        self.ticks.append(perf_counter())

    def restore(self) -> State | None:
        return None

    def checkpoint_due(self) -> bool:
        return False

    def save(self, state: State) -> None: ...

    def begin_stage(self, stage: Stage, epochs: int, steps: int, done: int) -> None: ...

    def epoch(self, entry: Mapping[str, Any]) -> None: ...

    def end_stage(self, stage: Stage, student: Backbone) -> None: ...
